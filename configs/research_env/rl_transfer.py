"""Does what research found on the small recipe of `pretrain_tiny` still help when the model and its budget are larger?

The ladder's base is that recipe at its own width, with width transfer; the campaign's best promoted change is its arm, on every
budget: 3, 6 and 12 times the FLOPs of a run of the campaign, models of up to twice its width.

Measured once: a campaign of 10 best-of-N mutations (`'arms=("best_of_n",)' num_candidates=10 batch=2 noise_repeats=6
max_confirmed=3`) promoted "Change hidden_width from 160 to 640", gain +0.054 [+0.010, +0.097] nats on 8 paired seeds. On the ladder
that is worth 0.30 [0.24, 0.38] times the compute (90 %, 12 pairs; 0.40, 0.28, 0.18 at the three budgets): reversed. The task
fixes the number of steps, so a wider layer was compute for nothing; at equal FLOPs it takes steps away. The runs took 8 minutes
in all of one core, the whole ladder 35 minutes beside other work.
Command: python -m research_env.main --config configs/research_env/pretrain_tiny.py
         python -m research_env.rl --config configs/research_env/rl_transfer.py
"""

from pretrain.checkpoint import CheckpointPolicy
from pretrain.data.source import StdlibConfig
from pretrain.data.tables import DataConfig
from pretrain.generate import SampleConfig
from pretrain.loss import LossConfig
from pretrain.model.transformer import ModelConfig
from pretrain.optim import AdamWConfig, OptimConfig, WarmupCosine
from pretrain.scaling.plan import LadderConfig, ScalingConfig, Shape
from pretrain.tokenizer import BytesConfig
from pretrain.train import RunConfig, TrainConfig
from research_env.rl.transfer import TransferConfig


def get_config() -> TransferConfig:
    return TransferConfig(
        campaign="runs/research/pretrain_tiny",
        scaling=ScalingConfig(
            # As research_env/tasks/pretrain_tiny/codebase/recipe.py says it; the tests compare.
            train=TrainConfig(
                model=ModelConfig(
                    num_layers=2,
                    width=64,
                    num_heads=2,
                    num_kv_heads=2,
                    head_width=32,
                    hidden_width=160,
                    base_width=64,
                    dtype="float32",
                    scan_layers=False,
                ),  # fmt: skip
                data=DataConfig(
                    sources=(StdlibConfig(name="stdlib"),),
                    tokenizer=BytesConfig(),
                    row_length=64,
                    batch_rows=16,
                    heldout_percent=2.0,
                    heldout_max_bytes=200_000,
                ),
                optim=OptimConfig(
                    method=AdamWConfig(b1=0.9, b2=0.99),
                    peak_lr=0.003,
                    schedule=WarmupCosine(num_warmup_steps=20, final_fraction=0.1),
                    weight_decay=0.1,
                    clip_norm=1.0,
                ),
                loss=LossConfig(z_weight=0.0001),
                run=RunConfig(num_steps=1, log_every_steps=50, writers=()),
                checkpoint=CheckpointPolicy(every_s=60.0, keep_last=1),
                sample=SampleConfig(prompts=()),
            ),
            ladder=LadderConfig(
                budgets_flops=(2e11, 4e11, 8e11),
                shapes=tuple(Shape(width=width, num_layers=2) for width in (32, 64, 96, 128)),
                shapes_per_budget=3,
                tokens_per_param=8.0,
                noise_seeds=(1,),
                num_arm_budgets=3,
            ),
        ),
    )
