"""An 8B decoder in the manner of Llama 3 on a pod; bring a corpus with data.root and data.sources.

Command: python -m pretrain.main --config configs/pretrain/llama_8b.py data.root=FOLDER distributed.cluster=tpu
Plan it: python -m pretrain.aot --config configs/pretrain/llama_8b.py aot.topology=v5p:4x4x4
Four million tokens a step. Fewer chips take more microbatches: run.num_microbatches = 512 / rows that fit at a time.
Not run yet on the hardware it is meant for.
"""

from pretrain.data.source import JsonlConfig
from pretrain.data.tables import DataConfig
from pretrain.model.transformer import LayerKind, ModelConfig, Rope
from pretrain.optim import MuonConfig, OptimConfig, Wsd
from pretrain.sharding import MeshConfig
from pretrain.tokenizer import BpeConfig
from pretrain.train import RunConfig, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        model=ModelConfig(
            num_layers=32,
            width=4096,
            num_heads=32,
            num_kv_heads=8,
            head_width=128,
            hidden_width=14_336,
            layer_pattern=(LayerKind(rope=Rope(theta=500_000.0)),),
            remat="save_attention",
        ),  # fmt: skip
        data=DataConfig(
            sources=(JsonlConfig(name="corpus", path="*.jsonl*"),),
            tokenizer=BpeConfig(vocab_size=131_072),
            row_length=8192,
            batch_rows=512,
            heldout_percent=0.05,
        ),
        optim=OptimConfig(
            method=MuonConfig(), peak_lr=6e-4, schedule=Wsd(num_warmup_steps=2000, decay_fraction=0.2)
        ),
        run=RunConfig(num_steps=100_000, num_microbatches=2, eval_every_steps=2000),
        mesh=MeshConfig(fsdp=-1),
    )
