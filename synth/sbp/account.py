"""Floating-point operations of every stage of one seed: what the paper leaves out, and what the arms really cost.

Training counts forward and backward over all positions, embedding and sampling a third of that (forward alone) over
the tokens that were read and written. Sampling reads its cache instead of the whole text, so attention is counted
as in a forward pass over the text, once.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from synth.sbp.parts import UNIQUE
from synth.sbp.trials import SYNTHETIC
from synth.stage import StageResult
from synth.training import Learner

_FORWARD = 1 / 3


def count_flops(config: Any, results: Mapping[str, StageResult]) -> dict[str, float]:
    """By stage; `config` is the pipeline's."""
    learner: Learner = config.learner
    tuner: Learner = config.tuning.learner(learner)
    vocab_size = next(results["tokenizer"].documents()).meta["vocab_size"]
    reference = next(results["reference"].documents()).meta
    found = {"reference": learner.flops(vocab_size, reference["train_tokens"])}
    found["embed"] = _FORWARD * learner.flops(vocab_size, reference["rows"][UNIQUE] * learner.row_length)
    for stage in ("tune_pair", "tune_random"):
        found[stage] = tuner.flops(vocab_size, next(results[stage].documents()).meta["train_tokens"])
    for arm in config.trials.synthetic_arms:
        counts = results[SYNTHETIC[arm]].counts
        tokens = counts.get("prompt_tokens", 0) + counts.get("new_tokens", 0)
        found[SYNTHETIC[arm]] = _FORWARD * tuner.flops(vocab_size, tokens)
    for document in results["trials"].documents():
        trial = document.meta["trial"]
        name = f"one run of {trial['arm']}"
        found[name] = max(found.get(name, 0.0), learner.flops(vocab_size, document.meta["train_tokens"]))
    return found


def account_lines(flops: Sequence[Mapping[str, float]]) -> list[str]:
    """The account in Markdown, a mean over seeds, beside what repetition spends; and what SBP costs all in all."""
    mean = {name: sum(f[name] for f in flops) / len(flops) for name in flops[0]}
    base = mean["one run of repetition"]
    lines = ["| stage, a seed | FLOPs | of one run of repetition |", "|---|---|---|"]
    lines += [f"| {name} | {value:.3g} | {value / base:.3f} |" for name, value in mean.items()]
    own = ("reference", "embed", "tune_pair", "texts_sbp", "one run of sbp")
    if all(name in mean for name in own):
        total = sum(mean[name] for name in own)
        lines.append(f"| SBP all in all ({', '.join(own)}) | {total:.3g} | {total / base:.3f} |")
    return lines
