"""Does a verifiable reward alone teach a small model which sums are right? Held-out accuracy before and after, on two CPU cores.

Command: python -m pretrain.main --config configs/rl/arithmetic_base.py
         python -m pretrain.main --config configs/rl/arithmetic_grpo.py init=runs/arithmetic_base/FINGERPRINT
"""

from pathlib import Path

from pretrain.checkpoint import CheckpointPolicy
from pretrain.config import load_config
from pretrain.generate import SampleConfig
from pretrain.optim import AdamWConfig, Constant, OptimConfig
from pretrain.rl.grpo import RlConfig
from pretrain.rl.policy_loss import PolicyLossConfig
from pretrain.rl.problem import ArithmeticConfig
from pretrain.rl.reward import NumberReward
from pretrain.rl.rollout import RolloutConfig
from pretrain.tokenizer import BytesConfig
from pretrain.train import RunConfig


def get_config() -> RlConfig:
    return RlConfig(
        init="runs/arithmetic_base",
        model=load_config(Path(__file__).with_name("arithmetic_base.py")).model,
        data=RolloutConfig(
            problems=ArithmeticConfig(max_operand=99, num_train=4000, num_heldout=200),
            reward=NumberReward(),
            tokenizer=BytesConfig(),
            prompts_per_step=128,
            samples_per_prompt=8,
            max_prompt_tokens=8,
            max_new_tokens=5,
            slots=256,
        ),
        optim=OptimConfig(
            method=AdamWConfig(), peak_lr=1e-4, schedule=Constant(num_warmup_steps=5), weight_decay=0.0
        ),
        # Without a pull back to the base a random reward walks anywhere, as Adam scales noise up to whole steps.
        loss=PolicyLossConfig(kl_weight=0.3),
        run=RunConfig(num_steps=40, log_every_steps=5, eval_every_steps=5),
        checkpoint=CheckpointPolicy(every_steps=50),
        sample=SampleConfig(prompts=()),
    )
