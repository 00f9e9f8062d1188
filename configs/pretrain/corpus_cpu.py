"""What does an hour on two CPU cores teach a small transformer about several corpora of English text?

Command: python -m pretrain.main --config configs/pretrain/corpus_cpu.py data.root=FOLDER
FOLDER holds the JSONL files named below (one object a line with a `text`); for other text, change the sources.
Hardware: two virtual CPU cores; an hour gives 250 steps on a machine that others use too, 1,000 are the whole schedule.
Result at step 250: 1.856 bits per byte held out; interpolated bigram 1.928, xz -9e 2.048, unigram 3.024.
"""

from pretrain.checkpoint import CheckpointPolicy
from pretrain.data.source import JsonlConfig
from pretrain.data.tables import DataConfig
from pretrain.generate import SampleConfig
from pretrain.loss import LossConfig
from pretrain.model.transformer import ModelConfig
from pretrain.optim import MuonConfig, OptimConfig, Wsd
from pretrain.tokenizer import BpeConfig
from pretrain.train import RunConfig, TrainConfig

CORPORA = ("medquad", "openstax_ccby", "peps", "eips", "factbook")


def get_config() -> TrainConfig:
    return TrainConfig(
        model=ModelConfig(
            num_layers=4,
            width=192,
            num_heads=6,
            num_kv_heads=3,
            head_width=32,
            hidden_width=512,
            tied_head=True,
            dtype="float32",
            scan_layers=False,
        ),
        data=DataConfig(
            sources=tuple(JsonlConfig(name=name, path=f"{name}.jsonl.gz") for name in CORPORA),
            tokenizer=BpeConfig(vocab_size=4096),
            row_length=512,
            batch_rows=16,
            heldout_percent=2.0,
            heldout_max_bytes=200_000,
        ),
        optim=OptimConfig(
            method=MuonConfig(),
            peak_lr=6e-3,
            schedule=Wsd(num_warmup_steps=50, decay_fraction=0.4),
            weight_decay=0.05,
        ),
        loss=LossConfig(chunk_tokens=2048),
        run=RunConfig(num_steps=1000, log_every_steps=10, eval_every_steps=250),
        checkpoint=CheckpointPolicy(every_s=120.0),
        sample=SampleConfig(prompts=("What is ", "The ", "Abstract\n"), max_new_tokens=96),
    )
