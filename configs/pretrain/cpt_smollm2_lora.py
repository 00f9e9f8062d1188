"""The run of cpt_smollm2.py with the model frozen: what do adapters of rank 16 gain, and what do they forget?

Command: python -m pretrain.main --config configs/pretrain/cpt_smollm2_lora.py data.root=FOLDER
Everything else is as there, but for the rate, which adapters take higher. What it gained and forgot:
configs/evaluate/cpt_smollm2.py with model=RUN; export and evaluation see the merged model.
"""

import dataclasses
from pathlib import Path

from pretrain.config import load_config
from pretrain.model.adapters import AdapterConfig
from pretrain.train import TrainConfig


def get_config() -> TrainConfig:
    whole = load_config(Path(__file__).with_name("cpt_smollm2.py"))
    return dataclasses.replace(
        whole,
        model=whole.model.with_adapters(AdapterConfig(rank=16)),
        optim=dataclasses.replace(whole.optim, peak_lr=5e-4),
    )
