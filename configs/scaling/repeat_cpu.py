"""How much is a token worth when it is read again? Loss at one number of steps on fewer and fewer documents.

Data: five English corpora as bytes; FOLDER holds the JSONL files named below. A small ladder on the same text gives
the laws their exponents; the last 2 % of the documents are held out from every run.
Command: python -m pretrain.scaling --config configs/scaling/repeat_cpu.py train.data.root=FOLDER
"""

from pretrain.checkpoint import CheckpointPolicy
from pretrain.data.source import JsonlConfig
from pretrain.data.tables import DataConfig
from pretrain.generate import SampleConfig
from pretrain.loss import LossConfig
from pretrain.model.transformer import ModelConfig
from pretrain.optim import AdamWConfig, OptimConfig, Wsd
from pretrain.scaling.plan import LadderConfig, RepeatConfig, ScalingConfig, Shape
from pretrain.scaling.slices import SliceConfig
from pretrain.tokenizer import BytesConfig
from pretrain.train import RunConfig, TrainConfig

CORPORA = ("medquad", "openstax_ccby", "peps", "eips", "factbook")
WIDTHS = (24, 32, 48, 64, 96)
# The shares of the documents: about 1, 2, 4, .. 64 epochs of the run's tokens; all of the text is 0.06 epochs. The
# smallest share is about eight documents: of fewer it would be their subject that counts.
FRACTIONS = (1.0, *(0.06 / 2**k for k in range(7)))


def get_config() -> ScalingConfig:
    texts = JsonlConfig(name="texts", path="*.jsonl.gz")
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
                sources=(
                    SliceConfig(name="train", source=texts, high=0.98),
                    SliceConfig(name="heldout", source=texts, low=0.98, heldout_percent=100.0),
                ),
                tokenizer=BytesConfig(),
                row_length=128,
                batch_rows=16,
                heldout_percent=0.0,
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
            budgets_flops=(8e10, 2.4e11, 7.2e11),
            shapes=tuple(Shape(width=width, num_layers=2) for width in WIDTHS),
            shapes_per_budget=4,
            tokens_per_param=20.0,
            repeat=RepeatConfig(shape=Shape(width=64, num_layers=2), num_steps=1800, fractions=FRACTIONS),
        ),
    )
