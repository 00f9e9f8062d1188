"""The smallest size at which the pair effect is expected on real text: 10M unique tokens, 50M parameters, one GPU.

Question: SBP minus random pairs and minus self-samples on held-out text, beside the fraction of the oracle's gain.
Command: python -m synth.main --config configs/synth/sbp_small_gpu.py data.inner.root=FOLDER
FOLDER holds JSONL files (gz, zst) with about 220M tokens of documents that have topical neighbors, so that the
oracle can be 20 times the unique part. Hardware: one H100 80 GB. Hours: not run yet; by 6 N T, 5 minutes an arm.
"""

from pretrain.checkpoint import CheckpointPolicy
from pretrain.data.source import JsonlConfig
from pretrain.model.transformer import ModelConfig
from pretrain.optim import OptimConfig, WarmupCosine
from pretrain.tokenizer import BpeConfig
from synth.neighbors import Exact
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

MODEL = ModelConfig(
    num_layers=10, width=512, num_heads=8, num_kv_heads=4, head_width=64, hidden_width=1536, tied_head=True
)


def get_config() -> SbpConfig:
    """Passages of 2,000 characters; 20 passes of 10M tokens, of which 75M are synthetic at a share of 37.5 %."""
    return SbpConfig(
        data=Passages(
            inner=Sources(sources=(JsonlConfig(name="corpus", path="*.jsonl*"),), root="data"),
            characters=2000,
            min_characters=200,
        ),
        tokenizer=BpeConfig(vocab_size=16_384),
        split=Split(unique=0.05, validation=0.005, test=0.005),
        learner=Learner(
            model=MODEL,
            optim=OptimConfig(peak_lr=3e-3, schedule=WarmupCosine(num_warmup_steps=150, final_fraction=0.05)),
            row_length=1024,
            batch_rows=64,
            checkpoint=CheckpointPolicy(every_s=300.0),
        ),
        reference_steps=3000,
        tuning=Tuning(
            optim=OptimConfig(peak_lr=3e-4, schedule=WarmupCosine(num_warmup_steps=50)),
            num_steps=1500,
            row_length=1600,
            batch_rows=32,
        ),
        index=Exact(),
        rule=PairRule(neighbors_per_document=20.0),
        gate=Gate(min_gain_nats=0.0),
        sampler=OwnSamplerConfig(
            model=MODEL, max_prompt_tokens=800, max_new_tokens=800, top_p=0.9, slots=256
        ),
        synthesis=SynthesisRule(samples_per_document=12),
        trials=Trials(
            num_steps=3050,
            fewer_steps=(0.25, 0.5),
            weight_decays=(0.1, 1.0, 3.0),
            synthetic_weight_decays=(0.1, 1.0),
            oracle_weight_decays=(0.1,),
            shares=(0.25, 0.375, 0.5),
        ),
        quality_sample=20_000,
        seeds=(0, 1, 2),
        run=RunConfig(workdir="runs/synth/sbp_small_gpu", num_shards=8),
    )
