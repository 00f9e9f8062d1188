"""The paper's large setting at 3B: 1T tokens of which 50B are unique and 125B synthetic.

Question: does SBP close 48 % of the oracle's gain (arXiv 2509.15248)? The oracle's 482B tokens are repeated twice.
Command: python -m synth.main --config configs/synth/sbp_dclm_3b_1t.py data.root=FOLDER
FOLDER holds DCLM-baseline as JSONL files (zst). Hardware: about 59,000 TPU v5p hours as published. Not run by us.
"""

from dataclasses import replace
from pathlib import Path

from pretrain.config import load_config
from pretrain.optim import OptimConfig, WarmupCosine
from synth.sbp.parts import Split
from synth.sbp.pipeline import SbpConfig

TOTAL_STEPS = 119_209


def get_config() -> SbpConfig:
    """As at 200B, five times as long."""
    small: SbpConfig = load_config(Path(__file__).with_name("sbp_dclm_3b_200b.py"))
    schedule = WarmupCosine(num_warmup_steps=5960, final_fraction=0.005)
    return replace(
        small,
        split=Split(unique=50 / 482, validation=0.0005, test=0.0005),
        learner=replace(small.learner, optim=OptimConfig(peak_lr=1e-2, schedule=schedule)),
        reference_steps=TOTAL_STEPS,
        synthesis=replace(small.synthesis, samples_per_document=6),
        trials=replace(small.trials, num_steps=TOTAL_STEPS, shares=(0.125,)),
        run=replace(small.run, workdir="runs/synth/sbp_dclm_3b_1t", num_shards=4096),
    )
