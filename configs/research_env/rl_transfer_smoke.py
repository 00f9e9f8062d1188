"""Does every part of a transfer work? A minute on one CPU core; the tests run it. Its multiplier has nothing to say.

Command: python -m research_env.rl --config configs/research_env/rl_transfer_smoke.py campaign=FOLDER
"""

import dataclasses
from pathlib import Path

from pretrain.config import load_config
from pretrain.scaling.fit import FitConfig
from pretrain.scaling.plan import LadderConfig, Shape
from research_env.rl.transfer import TransferConfig

HERE = Path(__file__)


def get_config() -> TransferConfig:
    config = load_config(HERE.with_name("rl_transfer.py"))
    small = load_config(HERE.parents[1] / "scaling" / "smoke.py")
    train = config.scaling.train
    scaling = dataclasses.replace(
        config.scaling,
        train=dataclasses.replace(
            train,
            data=dataclasses.replace(small.train.data, batch_rows=train.data.batch_rows),
            optim=dataclasses.replace(
                train.optim, schedule=dataclasses.replace(train.optim.schedule, num_warmup_steps=4)
            ),
        ),
        ladder=LadderConfig(
            budgets_flops=(8e9, 1.6e10),
            shapes=tuple(Shape(width=width, num_layers=1) for width in (32, 64, 96)),
            shapes_per_budget=3,
            tokens_per_param=0.5,
            num_arm_budgets=2,
        ),
        fit=FitConfig(num_bootstrap=20),
    )
    return dataclasses.replace(config, scaling=scaling)
