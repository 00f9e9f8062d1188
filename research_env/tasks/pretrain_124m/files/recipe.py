"""The recipe that research changes: shape of the model, optimizer, schedule, batch, steps."""

import os

from pretrain.loss import LossConfig
from pretrain.model.transformer import ModelConfig
from pretrain.optim import AdamWConfig, OptimConfig, WarmupCosine

VOCAB = 50304
ROW = 1024  # tokens of a training row
BATCH = 512  # rows of a step, over all devices
MICROBATCHES = 4
STEPS = max(1, round(5000 * float(os.environ.get("RUNG", "1"))))

MODEL = ModelConfig(
    num_layers=12,
    width=768,
    num_heads=12,
    num_kv_heads=12,
    head_width=64,
    hidden_width=2048,
    activation="silu",  # silu, gelu_tanh
    qk_norm=True,
    tied_head=True,
    embed_scale=False,
    post_norms=False,
    remat="save_attention",
)
OPTIM = OptimConfig(
    method=AdamWConfig(b1=0.9, b2=0.95),
    peak_lr=0.0006,
    schedule=WarmupCosine(num_warmup_steps=250, final_fraction=0.1),
    weight_decay=0.1,
    clip_norm=1.0,
)
LOSS = LossConfig(z_weight=0.0001)
