"""Does every part of a ladder work? Two minutes on one CPU core; the tests run it. Its fit has nothing to say.

Command: python -m pretrain.scaling --config configs/scaling/smoke.py
"""

from pretrain.checkpoint import CheckpointPolicy
from pretrain.data.source import MemoryConfig, TextDocument
from pretrain.data.tables import DataConfig
from pretrain.generate import SampleConfig
from pretrain.loss import LossConfig
from pretrain.model.transformer import ModelConfig
from pretrain.optim import AdamWConfig, OptimConfig, Wsd
from pretrain.scaling.fit import FitConfig
from pretrain.scaling.plan import LadderConfig, ScalingConfig, Shape
from pretrain.tokenizer import BytesConfig
from pretrain.train import RunConfig, TrainConfig

WORDS = ("ant", "bee", "cat", "dog", "eel", "fox", "gnu", "hen")


def documents() -> tuple[TextDocument, ...]:
    """Counting rhymes: enough structure for a loss to fall."""
    return tuple(
        TextDocument(
            id=f"rhyme-{i}",
            text=" ".join(f"{j} {WORDS[(i + j) % len(WORDS)]}s" for j in range(2 + i % 9)) + ".\n",
        )
        for i in range(400)
    )


def get_config() -> ScalingConfig:
    return ScalingConfig(
        train=TrainConfig(
            model=ModelConfig(
                num_layers=1,
                width=16,
                num_heads=2,
                num_kv_heads=2,
                head_width=8,
                hidden_width=32,
                base_width=16,
                dtype="float32",
                scan_layers=False,
            ),  # fmt: skip
            data=DataConfig(
                sources=(MemoryConfig(name="rhymes", documents=documents()),),
                tokenizer=BytesConfig(),
                row_length=32,
                batch_rows=4,
                heldout_percent=10.0,
            ),
            optim=OptimConfig(
                method=AdamWConfig(), peak_lr=3e-3, schedule=Wsd(num_warmup_steps=4, decay_fraction=0.3)
            ),
            loss=LossConfig(chunk_tokens=512),
            run=RunConfig(num_steps=1, log_every_steps=20, writers=()),
            checkpoint=CheckpointPolicy(every_steps=20),
            sample=SampleConfig(prompts=()),
        ),
        ladder=LadderConfig(
            budgets_flops=(1.5e8, 3e8),
            shapes=(
                Shape(width=8, num_layers=1),
                Shape(width=16, num_layers=1),
                Shape(width=32, num_layers=1),
            ),
            shapes_per_budget=3,
            tokens_per_param=1.0,
            held_out_flops=6e8,
        ),
        fit=FitConfig(num_bootstrap=20),
    )
