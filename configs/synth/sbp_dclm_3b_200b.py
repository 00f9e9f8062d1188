"""The paper's small setting: 3B parameters, 200B tokens of which 10B are unique and 75B synthetic.

Question: does SBP close 42 % of the gain that 20 times the unique data would bring (arXiv 2509.15248)?
Command: python -m synth.main --config configs/synth/sbp_dclm_3b_200b.py data.root=FOLDER
FOLDER holds DCLM-baseline as JSONL files (zst). Hardware: a pod of accelerators with about 11,000 chip hours an arm
set (TPU v5p, as published). Not run by us. Learning rate and schedule of the synthesizer are not published; ours is a
short cosine from 5e-5. Depth, width and heads are from secondary reports (unverified).
"""

from pretrain.checkpoint import CheckpointPolicy
from pretrain.data.source import JsonlConfig
from pretrain.model.transformer import LayerKind, ModelConfig, Rope
from pretrain.optim import OptimConfig, WarmupCosine
from pretrain.sharding import MeshConfig
from pretrain.tokenizer import TokenizerFileConfig
from synth.neighbors import InvertedLists
from synth.sbp.pair import PairRule
from synth.sbp.parts import Split
from synth.sbp.pipeline import SbpConfig
from synth.sbp.sampler import OwnSamplerConfig
from synth.sbp.synthesize import SynthesisRule
from synth.sbp.trials import Trials
from synth.sbp.tune import Gate, Tuning
from synth.sources import Sources
from synth.stage import RunConfig
from synth.training import Learner

MODEL = ModelConfig(
    num_layers=26, width=3072, num_heads=24, num_kv_heads=8, head_width=128, hidden_width=8192,
    layer_pattern=(LayerKind(rope=Rope(theta=500_000.0)),), remat="full",
)  # fmt: skip
TOKENS_PER_STEP = 2048 * 4096
TOTAL_STEPS = 23_842


def get_config() -> SbpConfig:
    """23,842 steps of 8.4M tokens an arm; the reference is the repetition arm's model, 20 passes over 10B tokens."""
    return SbpConfig(
        data=Sources(sources=(JsonlConfig(name="dclm", path="*.jsonl.zst"),), root="data"),
        tokenizer=TokenizerFileConfig(path="tokenizer.json"),
        split=Split(unique=10 / 482, validation=0.0005, test=0.0005),
        learner=Learner(
            model=MODEL,
            optim=OptimConfig(
                peak_lr=1e-2, schedule=WarmupCosine(num_warmup_steps=1192, final_fraction=0.005)
            ),
            row_length=4096,
            batch_rows=2048,
            num_microbatches=4,
            mesh=MeshConfig(fsdp=-1),
            checkpoint=CheckpointPolicy(every_s=1800.0),
        ),
        reference_steps=TOTAL_STEPS,
        tuning=Tuning(
            optim=OptimConfig(peak_lr=5e-5, schedule=WarmupCosine(num_warmup_steps=50)),
            num_steps=1200,
            row_length=4096,
            batch_rows=2048,
        ),
        index=InvertedLists(num_lists=65_536, num_probes=64),
        rule=PairRule(num_neighbors=200, neighbors_per_document=20.0),
        gate=Gate(min_gain_nats=0.0),
        sampler=OwnSamplerConfig(
            model=MODEL, max_prompt_tokens=2048, max_new_tokens=2048, top_p=0.9, slots=512
        ),
        # 75B tokens of 10B: 8 would do if every text were kept and as long as its seed. Texts have at most 2,048 tokens, and
        # those that do not end are left out, so a round keeps perhaps 6B (a guess).
        synthesis=SynthesisRule(samples_per_document=16),
        trials=Trials(
            num_steps=TOTAL_STEPS, fewer_steps=(), shares=(0.375,), synthetic_arms=("sbp", "random_pair")
        ),
        quality_sample=1_000_000,
        run=RunConfig(workdir="runs/synth/sbp_dclm_3b_200b", num_shards=1024),
    )
