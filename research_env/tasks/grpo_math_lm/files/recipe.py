"""The recipe that research changes: how many samples, how the policy moves, by how much."""

import os

from pretrain.optim import AdamWConfig, Constant, OptimConfig
from pretrain.rl.policy_loss import PolicyLossConfig

STEPS = max(1, round(20 * float(os.environ.get("RUNG", "1"))))
PROMPTS = 64  # of a step
SAMPLES = 8  # of a problem
UPDATES = 1  # steps that one rollout serves
MICROBATCHES = 64
SLOTS = 256  # texts sampled together
ESTIMATOR = "grpo"  # grpo, mean, rloo
FORMAT_REWARD = 0.0  # of a wrong answer that can be read

OPTIM = OptimConfig(
    method=AdamWConfig(b1=0.9, b2=0.99),
    peak_lr=1e-06,
    schedule=Constant(num_warmup_steps=min(2, STEPS)),
    weight_decay=0.0,
    clip_norm=1.0,
)
LOSS = PolicyLossConfig(normalize="token", kl_weight=0.0)
