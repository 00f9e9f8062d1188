"""Does EntiGraph put a small corpus into the weights, beyond repetition and paraphrase, and by which kind of question?

Paper: arXiv 2409.07431. Sixteen fictional documents of twelve facts, each told once; six arms, one base a seed, five
budgets of the same tokens, questions as told, reversed and over two facts; perfect scripted readers write the texts.
Command: python -m synth.main --config configs/synth/entigraph_worlds.py
Hardware: 2 CPU cores, no key, no network. Result: results.md, results.json and results.png in the workdir.

Recipes were chosen on the worlds of seeds above 100; the seeds below have not been run yet. There the base does not
always pass its gate (85 % with the book open): on seed 103 it answers 99.0 % as told, 99.0 % reversed and 52.0 % over
two facts, 80.3 % in all; on seed 102 it had not learned worlds of two facts when larger ones came, and ends at 46.3 %.
"""

from pretrain.checkpoint import CheckpointPolicy
from pretrain.data.mixture import MixtureStage
from pretrain.data.tables import DataConfig
from pretrain.generate import SampleConfig
from pretrain.loss import LossConfig
from pretrain.model.transformer import LayerKind, ModelConfig, Rope
from pretrain.optim import AdamWConfig, Constant, OptimConfig, Wsd
from pretrain.train import RunConfig as TrainRun
from pretrain.train import TrainConfig
from synth.arms.controlled import world_replicate
from synth.arms.experiment import ArmsConfig
from synth.arms.plan import Replicate, Tuning
from synth.stage import RunConfig
from synth.worlds.background import OpenBook, Recurring
from synth.worlds.words import WordsConfig
from synth.worlds.world import WorldConfig

SEEDS = (1, 2, 3)
NUM_NAMES = 512
WORLD = WorldConfig(num_documents=16, num_facts=12, num_names=NUM_NAMES)
# What reads within minutes: names that mean the same where they are read and where they are said (a tied head), loss on
# answers alone, and worlds of one or two facts first; an untied head or loss on questions too did not read in as many
# steps. Short convolutions bring the words of a fact together; a base without them was not tried with the rest.
MODEL = ModelConfig(
    num_layers=4, width=96, num_heads=3, num_kv_heads=3, head_width=32, hidden_width=192,
    layer_pattern=(LayerKind(rope=Rope(theta=1000.0)),), short_conv=4, tied_head=True, dtype="float32",
)  # fmt: skip


def train(
    sources: tuple, stages: tuple[MixtureStage, ...], optim: OptimConfig, num_steps: int
) -> TrainConfig:
    """A run on rows that hold an open book whole."""
    return TrainConfig(
        model=MODEL,
        data=DataConfig(
            sources=sources,
            tokenizer=WordsConfig(num_names=NUM_NAMES),
            row_length=256,
            batch_rows=8,
            stages=stages,
            heldout_max_bytes=20_000,
        ),
        optim=optim,
        loss=LossConfig(chunk_tokens=2048),
        run=TrainRun(num_steps=num_steps, log_every_steps=50, writers=()),
        checkpoint=CheckpointPolicy(every_s=60.0, keep_last=1),
        sample=SampleConfig(prompts=()),
    )


def book(name: str, seed: int, count: int, num_facts: tuple[int, int], **fields) -> OpenBook:
    """Fresh worlds with questions about them."""
    return OpenBook(name=name, seed=seed, count=count, num_names=NUM_NAMES, num_facts=num_facts, **fields)


def recurring(seed: int, count: int) -> Recurring:
    """Ten worlds to remember."""
    return Recurring(name="recurring", seed=seed, count=count, world=WORLD, num_worlds=10)


def base() -> TrainConfig:
    """Reading one or two facts, then a few, then over two facts, then worlds like the niche, and remembering others."""
    sources = (
        book("few", 1, 24_000, (1, 2), num_questions=3),
        book("some", 2, 24_000, (2, 6), num_questions=7),
        book("hops", 3, 30_000, (5, 12), num_questions=10, hop_share=0.6),
        book("whole", 4, 12_000, (12, 12), num_questions=10, hop_share=0.6),
        recurring(5, 6000),
    )
    stages = (
        MixtureStage(start_step=0, weights={"few": 1.0}),
        MixtureStage(start_step=500, weights={"few": 0.3, "some": 0.7}),
        MixtureStage(start_step=1000, weights={"some": 0.2, "hops": 0.8}),
        MixtureStage(start_step=2400, weights={"hops": 0.5, "whole": 0.3, "recurring": 0.2}),
    )
    optim = OptimConfig(
        method=AdamWConfig(b2=0.98),
        peak_lr=4e-3,
        schedule=Wsd(num_warmup_steps=50, final_fraction=0.1),
        weight_decay=0.0,
    )
    return train(sources, stages, optim, num_steps=3400)


def tuning() -> Tuning:
    """At most 400 steps of own text and replay in the proportion 85 to 15: about 44,000 to 700,000 tokens."""
    budgets = (25, 50, 100, 200, 400)
    sources = (
        book("whole", 14, 1000, (12, 12), num_questions=10, hop_share=0.4),
        recurring(15, 600),
    )
    optim = OptimConfig(
        method=AdamWConfig(b2=0.98), peak_lr=2e-3, schedule=Constant(num_warmup_steps=5), weight_decay=0.0
    )
    return Tuning(train=train(sources, (), optim, budgets[-1]), replay=0.15, budget_steps=budgets)


def replicate(seed: int) -> Replicate:
    """Worlds, base and orders of one seed."""
    return world_replicate(
        seed=seed, world=WORLD, base=base(), tuning=tuning(), versions=600, max_triples=None
    )


def get_config() -> ArmsConfig:
    """Three seeds."""
    return ArmsConfig(
        replicates=tuple(replicate(seed) for seed in SEEDS),
        kinds=("same", "reverse", "hop2", "inferred"),
        run=RunConfig(workdir="runs/synth/entigraph_worlds"),
    )
