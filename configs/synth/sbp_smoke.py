"""Does every stage of synthetic bootstrapped pretraining work? Far too small to learn anything from pairs.

Command: python -m synth.main --config configs/synth/sbp_smoke.py
Hardware: one CPU core, under a minute. Result: results.md in the workdir; the gate only reports.
"""

from pretrain.checkpoint import CheckpointPolicy
from pretrain.loss import LossConfig
from pretrain.model.transformer import ModelConfig
from pretrain.optim import OptimConfig, WarmupCosine
from synth.llm.scripted import ScriptedConfig
from synth.sbp.pair import PairRule
from synth.sbp.parts import Split
from synth.sbp.pipeline import SbpConfig
from synth.sbp.sampler import OwnSamplerConfig
from synth.sbp.synthesize import SynthesisRule
from synth.sbp.trials import Trials
from synth.sbp.tune import Gate, Tuning
from synth.stage import RunConfig
from synth.training import Learner
from synth.worlds.concepts import ConceptDocuments, ConceptFloor, ConceptWorldConfig, WordTokenizerConfig

WORLD = ConceptWorldConfig(num_concepts=6, num_words=64, num_genres=2, min_length=8, max_length=16)
MODEL = ModelConfig(
    num_layers=1,
    width=16,
    num_heads=2,
    num_kv_heads=1,
    head_width=8,
    hidden_width=32,
    dtype="float32",
    scan_layers=False,
)


def get_config() -> SbpConfig:
    """About 100 unique documents of a dozen words; all arms, one seed."""
    optim = OptimConfig(peak_lr=1e-2, schedule=WarmupCosine(num_warmup_steps=2))
    return SbpConfig(
        data=ConceptDocuments(world=WORLD, num_documents=600),
        tokenizer=WordTokenizerConfig(words=WORLD.words()),
        split=Split(unique=0.2, validation=0.1, test=0.1),
        learner=Learner(
            model=MODEL,
            optim=optim,
            row_length=32,
            batch_rows=8,
            loss=LossConfig(chunk_tokens=256),
            checkpoint=CheckpointPolicy(every_s=None),
            num_evals=2,
        ),
        reference_steps=12,
        tuning=Tuning(optim=optim, num_steps=8, row_length=40, batch_rows=8),
        rule=PairRule(
            num_neighbors=20,
            neighbors_per_document=8.0,
            max_per_first=4,
            recall_sample=20,
            label_key="concept",
        ),
        gate=Gate(min_gain_nats=None),
        sampler=OwnSamplerConfig(model=MODEL, max_prompt_tokens=20, max_new_tokens=20, slots=16),
        synthesis=SynthesisRule(samples_per_document=3),
        trials=Trials(num_steps=16, fewer_steps=(), shares=(0.25,)),
        quality_sample=100,
        judge=ScriptedConfig(),
        judge_sample=5,
        floor=ConceptFloor(world=WORLD),
        run=RunConfig(workdir="runs/synth/sbp_smoke", num_shards=2),
    )
