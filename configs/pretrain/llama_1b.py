"""A 1B decoder in the manner of Llama 3.2 on one host of accelerators; bring a corpus with data.root and data.sources.

Command: python -m pretrain.main --config configs/pretrain/llama_1b.py data.root=FOLDER
Its step was timed on one H100 (docs/kernels.md), where remat=save_products and scan_layers=false are faster; nothing was trained yet.
"""

from pretrain.data.source import JsonlConfig
from pretrain.data.tables import DataConfig
from pretrain.model.transformer import LayerKind, ModelConfig, Rope
from pretrain.optim import MuonConfig, OptimConfig, Wsd
from pretrain.tokenizer import BpeConfig
from pretrain.train import RunConfig, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        model=ModelConfig(
            num_layers=16,
            width=2048,
            num_heads=32,
            num_kv_heads=8,
            head_width=64,
            hidden_width=8192,
            tied_head=True,
            layer_pattern=(LayerKind(rope=Rope(theta=500_000.0)),),
            remat="save_attention",
        ),
        data=DataConfig(
            sources=(JsonlConfig(name="corpus", path="*.jsonl*"),),
            tokenizer=BpeConfig(vocab_size=65_536),
            row_length=4096,
            batch_rows=256,
            heldout_percent=0.1,
        ),
        optim=OptimConfig(
            method=MuonConfig(), peak_lr=1e-3, schedule=Wsd(num_warmup_steps=1000, decay_fraction=0.2)
        ),
        run=RunConfig(num_steps=40_000, num_microbatches=8, eval_every_steps=1000),
    )
