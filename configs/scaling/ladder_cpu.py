"""Does a law fitted to minutes of two CPU cores predict a run of four times their largest budget within 3 %?

Data: the standard library of the running Python, as bytes; nothing to download, and no run reads a byte twice.
Command: python -m pretrain.scaling --config configs/scaling/ladder_cpu.py

Measured on two CPU cores that did other work too, in 11 minutes: 26 runs; the held-out run of 3.75e12 FLOPs has loss 1.4242,
predicted 1.4170 [1.3534, 1.5251], an error of -0.51 %. The fit itself doubts its parts: alpha 0.277 [0.171, 0.792] is not
resolved by widths 16 to 80, and E is 0 [0, 0.653]. Slopes of the coordinate check (`check` before `--config`): logits +0.042,
blocks -0.110 and -0.062; without width transfer +0.764, +0.648 and +0.620.
"""

from pretrain.checkpoint import CheckpointPolicy
from pretrain.data.source import StdlibConfig
from pretrain.data.tables import DataConfig
from pretrain.generate import SampleConfig
from pretrain.loss import LossConfig
from pretrain.model.transformer import ModelConfig
from pretrain.optim import AdamWConfig, OptimConfig, Wsd
from pretrain.scaling.plan import LadderConfig, ScalingConfig, Shape
from pretrain.tokenizer import BytesConfig
from pretrain.train import RunConfig, TrainConfig

WIDTHS = (16, 24, 32, 40, 48, 64, 80, 96, 128)


def get_config() -> ScalingConfig:
    return ScalingConfig(
        train=TrainConfig(
            model=ModelConfig(
                num_layers=2,
                width=32,
                num_heads=4,
                num_kv_heads=4,
                head_width=8,
                hidden_width=96,
                base_width=32,
                dtype="float32",
                scan_layers=False,
            ),  # fmt: skip
            data=DataConfig(
                sources=(StdlibConfig(name="stdlib"),),
                tokenizer=BytesConfig(),
                row_length=128,
                batch_rows=16,
                heldout_percent=2.0,
                heldout_max_bytes=200_000,
            ),
            optim=OptimConfig(
                method=AdamWConfig(), peak_lr=1e-2, schedule=Wsd(num_warmup_steps=20, decay_fraction=0.3)
            ),
            loss=LossConfig(chunk_tokens=2048),
            run=RunConfig(num_steps=1, log_every_steps=50, writers=()),
            checkpoint=CheckpointPolicy(every_s=60.0, keep_last=1),
            sample=SampleConfig(prompts=()),
        ),
        ladder=LadderConfig(
            budgets_flops=(6e10, 1.5e11, 3.75e11, 9.375e11),
            shapes=tuple(Shape(width=width, num_layers=2) for width in WIDTHS),
            shapes_per_budget=5,
            tokens_per_param=20.0,
            noise_seeds=(1,),
            held_out_flops=3.75e12,
        ),
    )
