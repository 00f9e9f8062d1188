"""Does every stage of the experiment in controlled worlds work? Its models are far too small to learn anything.

Command: python -m synth.main --config configs/synth/entigraph_worlds_smoke.py
Hardware: one CPU core, under a minute. Result: results.md in the workdir; the gates fail and are not enforced.
"""

from dataclasses import replace

from pretrain.checkpoint import CheckpointPolicy
from pretrain.data.tables import DataConfig
from pretrain.generate import SampleConfig
from pretrain.model.transformer import ModelConfig
from pretrain.optim import Constant, OptimConfig
from pretrain.train import RunConfig as TrainRun
from pretrain.train import TrainConfig
from synth.arms.controlled import world_replicate
from synth.arms.experiment import ArmsConfig
from synth.arms.plan import Gates, Tuning
from synth.stage import RunConfig
from synth.training import HereConfig
from synth.worlds.background import OpenBook, Recurring
from synth.worlds.words import WordsConfig
from synth.worlds.world import WorldConfig

NUM_NAMES = 128
WORLD = WorldConfig(num_documents=2, num_names=NUM_NAMES)


def run_of(num_steps: int) -> TrainConfig:
    """A model of one layer that reads fresh worlds and recurring ones."""
    return TrainConfig(
        model=ModelConfig(
            num_layers=1,
            width=32,
            num_heads=2,
            num_kv_heads=2,
            head_width=16,
            hidden_width=32,
            dtype="float32",
        ),
        data=DataConfig(
            sources=(
                OpenBook(
                    name="book", seed=1, count=24, num_names=NUM_NAMES, num_facts=(2, 12), num_questions=4
                ),
                Recurring(name="recurring", seed=2, count=24, world=WORLD, num_worlds=2),
            ),
            tokenizer=WordsConfig(num_names=NUM_NAMES),
            row_length=192,
            batch_rows=8,
            heldout_percent=20.0,
        ),
        optim=OptimConfig(peak_lr=1e-3, schedule=Constant()),
        run=TrainRun(num_steps=num_steps, writers=()),
        checkpoint=CheckpointPolicy(every_s=None),
        sample=SampleConfig(prompts=()),
    )


def get_config() -> ArmsConfig:
    """Two arms, two budgets, one seed."""
    base = run_of(1)
    tuning = Tuning(train=run_of(2), replay=0.25, budget_steps=(1, 2))
    replicate = world_replicate(seed=1, world=WORLD, base=base, tuning=tuning, versions=3, max_triples=0)
    arms = tuple(arm for arm in replicate.arms if arm.name in ("raw", "entigraph"))
    return ArmsConfig(
        replicates=(replace(replicate, arms=arms),),
        kinds=("same", "reverse", "hop2"),
        gates=Gates(stop=False),
        run=RunConfig(workdir="runs/synth/entigraph_worlds_smoke"),
        jobs=HereConfig(),
    )
