"""Eight experts for every feed-forward network of the 1B decoder, two of them active, on a pod of small chips.

Command: python -m pretrain.main --config configs/pretrain/moe_8x1b.py data.root=FOLDER distributed.cluster=tpu
Plan it: python -m pretrain.aot --config configs/pretrain/moe_8x1b.py aot.topology=v5e:16x16
Loads are balanced by bias (arXiv 2408.15664), no token is dropped.
The plan (jax 0.10.2, libtpu 0.0.42.1): 12.2 of 15.75 GiB a chip, a step between 0.70 and 1.18 s by the data sheets.
Not run yet on the hardware it is meant for.
"""

from pretrain.data.source import JsonlConfig
from pretrain.data.tables import DataConfig
from pretrain.model.moe import BiasBalance, MoeConfig
from pretrain.model.transformer import LayerKind, ModelConfig, Rope
from pretrain.optim import MuonConfig, OptimConfig, Wsd
from pretrain.sharding import MeshConfig
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
            moe=MoeConfig(num_experts=8, num_active=2, balance=BiasBalance(rate=1e-3), z_weight=1e-3),
        ),  # fmt: skip
        data=DataConfig(
            sources=(JsonlConfig(name="corpus", path="*.jsonl*"),),
            tokenizer=BpeConfig(vocab_size=65_536),
            row_length=4096,
            batch_rows=512,
            heldout_percent=0.1,
        ),
        optim=OptimConfig(
            method=MuonConfig(), peak_lr=1e-3, schedule=Wsd(num_warmup_steps=1000, decay_fraction=0.2)
        ),
        run=RunConfig(num_steps=40_000, num_microbatches=2, eval_every_steps=1000),
        mesh=MeshConfig(fsdp=-1, expert=8),
    )
