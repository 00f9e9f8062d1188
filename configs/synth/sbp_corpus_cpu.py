"""The whole experiment on real English text, small enough for a CPU: a dress rehearsal with honest numbers.

Question: does everything run on real text, and does a synthesizer this small learn anything from pairs? Prototypes
of 0.2M parameters and 33,000 unique tokens did not, so the gate only reports here.
Command: python -m synth.main --config configs/synth/sbp_corpus_cpu.py data.inner.root=FOLDER
FOLDER holds the JSONL files named below. Hardware: two CPU cores. Hours: not measured yet.
"""

from pretrain.checkpoint import CheckpointPolicy
from pretrain.data.source import JsonlConfig
from pretrain.jobs.pool import PoolConfig
from pretrain.loss import LossConfig
from pretrain.model.transformer import ModelConfig
from pretrain.optim import OptimConfig, WarmupCosine
from pretrain.tokenizer import BpeConfig
from synth.sbp.pair import PairRule
from synth.sbp.parts import Passages, Split
from synth.sbp.pipeline import SbpConfig
from synth.sbp.sampler import OwnSamplerConfig
from synth.sbp.synthesize import SynthesisRule
from synth.sbp.trials import Trials
from synth.sbp.tune import Gate, Tuning
from synth.sources import Sources
from synth.stage import RunConfig
from synth.training import Learner

CORPORA = ("medquad", "openstax_ccby", "factbook")
MODEL = ModelConfig(
    num_layers=4, width=128, num_heads=4, num_kv_heads=2, head_width=32, hidden_width=384, dtype="float32", tied_head=True,
    scan_layers=False,
)  # fmt: skip


def get_config() -> SbpConfig:
    """Passages of 600 characters, about 0.5M unique tokens, 4M trained ones an arm, one seed."""
    return SbpConfig(
        data=Passages(
            inner=Sources(
                sources=tuple(JsonlConfig(name=name, path=f"{name}.jsonl.gz") for name in CORPORA),
                root="data",
            ),
            characters=600,
            min_characters=200,
        ),
        tokenizer=BpeConfig(vocab_size=2048),
        split=Split(unique=0.04, validation=0.01, test=0.01),
        learner=Learner(
            model=MODEL,
            optim=OptimConfig(peak_lr=3e-3, schedule=WarmupCosine(num_warmup_steps=50, final_fraction=0.05)),
            row_length=256,
            batch_rows=16,
            loss=LossConfig(chunk_tokens=4096),
            checkpoint=CheckpointPolicy(every_s=120.0),
        ),
        reference_steps=500,
        tuning=Tuning(
            optim=OptimConfig(peak_lr=1e-3, schedule=WarmupCosine(num_warmup_steps=20), weight_decay=0.5),
            num_steps=300,
            row_length=600,
            batch_rows=8,
        ),
        rule=PairRule(num_neighbors=100, neighbors_per_document=10.0, label_key="source"),
        gate=Gate(min_gain_nats=None),
        sampler=OwnSamplerConfig(
            model=MODEL, max_prompt_tokens=290, max_new_tokens=290, min_p=0.02, slots=64
        ),
        synthesis=SynthesisRule(samples_per_document=12),
        trials=Trials(
            num_steps=1000,
            fewer_steps=(0.25, 0.5),
            weight_decays=(0.1, 1.0),
            synthetic_weight_decays=(0.1, 1.0),
            oracle_weight_decays=(0.1,),
            shares=(0.25, 0.5),
        ),
        run=RunConfig(workdir="runs/synth/sbp_corpus_cpu", num_shards=2),
        jobs=PoolConfig(),
    )
