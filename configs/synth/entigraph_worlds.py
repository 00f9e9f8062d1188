"""Does EntiGraph put a small corpus into the weights, beyond repetition and paraphrase, and by which kind of question?

Paper: arXiv 2409.07431. Eight fictional documents of 24 facts, each told once; six arms, one base a seed, five
budgets of the same tokens, questions as told, reversed and over two facts; perfect scripted readers write the texts.
Command: python -m synth.main --config configs/synth/entigraph_worlds.py
Hardware: 2 CPU cores, no key, no network. Result: results.md, results.json and results.png in the workdir.

Recipes were chosen on the worlds of seeds above 100, never on those of the seeds below.
"""

from pretrain.checkpoint import CheckpointPolicy
from pretrain.data.mixture import MixtureStage
from pretrain.data.tables import DataConfig
from pretrain.generate import SampleConfig
from pretrain.loss import LossConfig
from pretrain.model.transformer import LayerKind, ModelConfig, Rope
from pretrain.optim import Constant, MuonConfig, OptimConfig, WarmupCosine
from pretrain.train import RunConfig as TrainRun
from pretrain.train import TrainConfig
from synth.arms.controlled import world_replicate
from synth.arms.experiment import ArmsConfig
from synth.arms.plan import Tuning
from synth.stage import RunConfig
from synth.worlds.background import Copies, Recurring, Retold
from synth.worlds.words import WordsConfig
from synth.worlds.world import WorldConfig

SEEDS = (1, 2, 3)
NUM_NAMES = 512
WORLD = WorldConfig(num_documents=8, num_names=NUM_NAMES)
# A window of a sentence and a global layer in turn: the first gathers what a sentence says, the second looks it up.
# In a prototype, layers that all see everything did not learn to read within these tokens.
PATTERN = (LayerKind(window=8, rope=Rope(theta=100.0)), LayerKind(rope=Rope(theta=1000.0)))
MODEL = ModelConfig(
    num_layers=4, width=96, num_heads=3, num_kv_heads=3, head_width=32, hidden_width=192,
    layer_pattern=PATTERN, dtype="float32",
)  # fmt: skip
ROW = 304  # a document twice, or a document with its retelling


def data(sources: tuple, stages: tuple[MixtureStage, ...], batch_rows: int) -> DataConfig:
    """Rows that hold a fresh world with its retelling whole."""
    return DataConfig(
        sources=sources,
        tokenizer=WordsConfig(num_names=NUM_NAMES),
        row_length=ROW,
        batch_rows=batch_rows,
        stages=stages,
        heldout_max_bytes=20_000,
    )


def small(seed: int, count: int) -> Retold:
    """Worlds of eight entities: the first lessons in reading."""
    return Retold(
        name="small",
        seed=seed,
        count=count,
        num_names=NUM_NAMES,
        per_type=(2, 2, 2, 2),
        retellings=9,
        max_hops=1,
    )


def large(seed: int, count: int) -> Retold:
    """Worlds as large as those of the niche."""
    return Retold(name="large", seed=seed, count=count, num_names=NUM_NAMES, retellings=14)


def recurring(seed: int, count: int) -> Recurring:
    """Sixteen worlds to remember."""
    return Recurring(name="recurring", seed=seed, count=count, world=WORLD, num_worlds=16)


def base() -> TrainConfig:
    """Copying, then reading small worlds, then reading large ones and remembering others."""
    stages = (
        MixtureStage(start_step=0, weights={"copies": 0.7, "small": 0.3}),
        MixtureStage(start_step=60, weights={"copies": 0.1, "small": 0.9}),
        MixtureStage(start_step=200, weights={"small": 0.2, "large": 0.5, "recurring": 0.3}),
    )
    copies = Copies(name="copies", seed=1, count=3000, num_names=NUM_NAMES)
    return TrainConfig(
        model=MODEL,
        data=data((copies, small(2, 6000), large(3, 8000), recurring(4, 6000)), stages, 16),
        optim=OptimConfig(
            method=MuonConfig(), peak_lr=4e-3, schedule=WarmupCosine(num_warmup_steps=20), weight_decay=0.0
        ),
        loss=LossConfig(chunk_tokens=2048),
        run=TrainRun(num_steps=1000, log_every_steps=50, writers=()),
        checkpoint=CheckpointPolicy(every_s=60.0, keep_last=1),
        sample=SampleConfig(prompts=()),
    )


def tuning() -> Tuning:
    """At most 320 steps of own text and replay in the proportion 85 to 15: about 40,000 to 660,000 tokens."""
    budgets = (20, 40, 80, 160, 320)
    return Tuning(
        train=TrainConfig(
            model=MODEL,
            data=data((large(13, 600), recurring(14, 600)), (), 8),
            optim=OptimConfig(
                method=MuonConfig(),
                peak_lr=2e-3,
                schedule=Constant(num_warmup_steps=5),
                weight_decay=0.0,
            ),
            loss=LossConfig(chunk_tokens=2048),
            run=TrainRun(num_steps=budgets[-1], log_every_steps=20, writers=()),
            checkpoint=CheckpointPolicy(every_s=None, keep_last=1),
            sample=SampleConfig(prompts=()),
        ),
        replay=0.15,
        budget_steps=budgets,
    )


def get_config() -> ArmsConfig:
    """Three seeds: worlds, base, orders."""
    return ArmsConfig(
        replicates=tuple(
            world_replicate(
                seed=seed, world=WORLD, base=base(), tuning=tuning(), versions=600, max_triples=None
            )
            for seed in SEEDS
        ),
        kinds=("same", "reverse", "hop2"),
        run=RunConfig(workdir="runs/synth/entigraph_worlds"),
    )
