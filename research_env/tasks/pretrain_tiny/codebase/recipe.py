"""The recipe that research changes: shape of the model, optimizer, schedule, batch, steps."""

import os

from pretrain.loss import LossConfig
from pretrain.model.transformer import ModelConfig
from pretrain.optim import AdamWConfig, OptimConfig, WarmupCosine

VOCAB = 128
ROW = 64  # tokens of a training row
BATCH = 16  # rows of a step
STEPS = max(1, round(100 * float(os.environ.get("RUNG", "1"))))

MODEL = ModelConfig(
    num_layers=2,
    width=64,
    num_heads=2,
    num_kv_heads=2,
    head_width=32,
    hidden_width=160,
    activation="silu",  # silu, gelu_tanh
    qk_norm=True,
    tied_head=False,
    embed_scale=False,
    post_norms=False,
    scan_layers=False,
    dtype="float32",
)
OPTIM = OptimConfig(
    method=AdamWConfig(b1=0.9, b2=0.99),
    peak_lr=0.003,
    schedule=WarmupCosine(num_warmup_steps=20, final_fraction=0.1),
    weight_decay=0.1,
    clip_norm=1.0,
)
LOSS = LossConfig(z_weight=0.0001, chunk_tokens=1024)
