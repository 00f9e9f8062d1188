"""Does every part of a training run work? Seconds on one CPU core; the tests run it.

Command: python -m pretrain.main --config configs/pretrain/smoke.py
Hardware: one CPU core, under a minute. Result: none, 30 steps on counting rhymes teach counting rhymes.
"""

from pretrain.checkpoint import CheckpointPolicy
from pretrain.data.source import MemoryConfig, TextDocument
from pretrain.data.tables import DataConfig
from pretrain.generate import SampleConfig
from pretrain.loss import LossConfig
from pretrain.model.transformer import ModelConfig
from pretrain.optim import AdamWConfig, OptimConfig, WarmupCosine
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
        for i in range(200)
    )


def get_config() -> TrainConfig:
    return TrainConfig(
        model=ModelConfig(
            num_layers=2,
            width=32,
            num_heads=2,
            num_kv_heads=1,
            head_width=16,
            hidden_width=64,
            dtype="float32",
        ),
        data=DataConfig(
            sources=(MemoryConfig(name="rhymes", documents=documents()),),
            tokenizer=BytesConfig(),
            row_length=64,
            batch_rows=8,
            heldout_percent=10.0,
        ),
        optim=OptimConfig(method=AdamWConfig(), peak_lr=1e-2, schedule=WarmupCosine(num_warmup_steps=5)),
        loss=LossConfig(chunk_tokens=512),
        run=RunConfig(num_steps=30, log_every_steps=5, eval_every_steps=15),
        checkpoint=CheckpointPolicy(every_steps=10),
        sample=SampleConfig(prompts=("3 ",), max_new_tokens=16),
    )
