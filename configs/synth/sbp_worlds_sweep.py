"""Where does SBP help in worlds of concepts: unique data, passes and model size varied one at a time.

Question: the second table of `sbp_worlds.py`. One seed and one weight decay a case.
Command: python -m synth.main --config configs/synth/sbp_worlds_sweep.py
Hardware: two CPU cores. Hours: not measured yet; about nine thirtieths of those of `sbp_worlds.py`.
"""

from dataclasses import replace
from pathlib import Path

from pretrain.config import load_config
from synth.sbp.pipeline import SbpConfig
from synth.sbp.sweep import Case, SweepConfig
from synth.stage import RunConfig


def get_config() -> SweepConfig:
    """Seven cases around the middle one."""
    whole: SbpConfig = load_config(Path(__file__).with_name("sbp_worlds.py"))
    trials = replace(
        whole.trials,
        weight_decays=(0.3,),
        synthetic_weight_decays=(0.3,),
        oracle_weight_decays=(0.3,),
        shares=(0.5,),
    )
    middle = replace(whole, seeds=(0,), trials=trials)

    def unique(factor: float) -> SbpConfig:
        # As many synthetic texts from fewer or more seeds: with half of both there is too little for the share.
        samples = round(middle.synthesis.samples_per_document / factor)
        return replace(
            middle,
            split=replace(middle.split, unique=middle.split.unique * factor),
            synthesis=replace(middle.synthesis, samples_per_document=samples),
        )

    def passes(factor: float) -> SbpConfig:
        samples = round(middle.synthesis.samples_per_document * factor)
        return replace(
            middle,
            trials=replace(trials, num_steps=round(trials.num_steps * factor)),
            synthesis=replace(middle.synthesis, samples_per_document=samples),
        )

    def width(value: int) -> SbpConfig:
        model = replace(middle.learner.model, width=value, head_width=value // 4, hidden_width=value * 8 // 3)
        learner = replace(middle.learner, model=model)
        return replace(middle, learner=learner, sampler=replace(middle.sampler, model=model))

    return SweepConfig(
        cases=(
            Case(varied="none", value="as in sbp_worlds", config=middle),
            Case(varied="unique", value="half", config=unique(0.5)),
            Case(varied="unique", value="double", config=unique(2.0)),
            Case(varied="passes", value="half", config=passes(0.5)),
            Case(varied="passes", value="double", config=passes(2.0)),
            Case(varied="width", value="48", config=width(48)),
            Case(varied="width", value="192", config=width(192)),
        ),
        run=RunConfig(workdir="runs/synth/sbp_worlds_sweep"),
    )
