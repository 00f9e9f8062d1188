"""What an epoch of ideas looked like. A rising mean alone says nothing: it rises while the ideas die out.

A ideas, P samples of an epoch. `value` is the paper's reward (1/loss, or the metric; 0 for a failure) whatever the policy is
trained on, so that variants compare.
"""

import math
from collections.abc import Sequence

import numpy as np

from research_env.novelty import jaccard, words
from research_env.records import Idea, Result
from research_env.rl.credit import rewards_of
from research_env.rl.policy import PolicyState, kl

QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)


def similarities_AA(ideas: Sequence[Idea]) -> np.ndarray:
    """Jaccard similarity of the words of each two ideas, float64 [A, A]; 1 on the diagonal."""
    sets = [words(idea.text) for idea in ideas]
    return np.array([[jaccard(left, right) for right in sets] for left in sets])


def effective_number(counts_A: np.ndarray) -> float:
    """exp of the entropy of a histogram: A when all are used alike, 1 when one is used alone."""
    shares = counts_A[counts_A > 0] / counts_A.sum()
    return math.exp(-float((shares * np.log(shares)).sum()))


def true_values(results: Sequence[Result]) -> list[float] | None:
    """Values without noise, where the judge knows the truth (`planted`); 0 for a failure. None elsewhere."""
    if not any("true_loss" in result.extra for result in results):
        return None
    return [1.0 / result.extra["true_loss"] if "true_loss" in result.extra else 0.0 for result in results]


def outcomes(results: Sequence[Result]) -> dict[str, float]:
    """What an epoch's samples, host faults left out, were worth. mean, q10..q90, maximum: of the value. ok_mean: value
    given success. true_maximum: the epoch's best without noise, where the judge knows it.
    """
    values = rewards_of(results, "paper")
    is_ok = np.array([result.metric is not None for result in results])
    numbers = {"mean": float(values.mean())}
    for q, value in zip(QUANTILES, np.quantile(values, QUANTILES), strict=True):
        numbers[f"q{round(100 * q)}"] = float(value)
    numbers["maximum"] = float(values.max())
    true = true_values(results)
    if true is not None:
        numbers["true_maximum"] = max(true)
    numbers["success_rate"] = float(is_ok.mean())
    numbers["ok_mean"] = float(values[is_ok].mean()) if is_ok.any() else 0.0
    return numbers


def diversity(counts_A: np.ndarray) -> dict[str, float]:
    """How many ideas an epoch had, from how often it had each."""
    return {
        "effective_ideas": effective_number(counts_A),
        "top_two_share": float(np.sort(counts_A)[-2:].sum() / counts_A.sum()),
        "unique_share": float((counts_A > 0).sum() / counts_A.sum()),
    }


def wording(picks_P: np.ndarray, ideas: Sequence[Idea], similarity_AA: np.ndarray) -> dict[str, float]:
    """similarity: mean over pairs of samples. idea_words: mean length."""
    counts_A = np.bincount(picks_P, minlength=len(ideas))
    count = len(picks_P)
    pairs = count * (count - 1)
    same = float(counts_A @ similarity_AA @ counts_A) - count  # a sample is not compared with itself
    return {
        "similarity": same / pairs if pairs else 1.0,
        "idea_words": float(np.mean([len(ideas[int(i)].text.split()) for i in picks_P])),
    }


def measure(
    picks_P: np.ndarray,
    results: Sequence[Result],
    state: PolicyState,
    start: PolicyState,
    ideas: Sequence[Idea],
    similarity_AA: np.ndarray,
) -> dict[str, float]:
    """The numbers of one epoch; `state` is the policy that was sampled. Host faults are counted and left out of the rest.

    See `outcomes`, `diversity` and `wording`. kl: to the starting policy, nats.
    """
    kept = [i for i, result in enumerate(results) if result.status.is_sample]
    assert kept, "an epoch without a sample has no numbers"
    return {
        "dropped": len(results) - len(kept),
        **outcomes([results[i] for i in kept]),
        **diversity(np.bincount(picks_P[kept], minlength=len(ideas))),
        **wording(picks_P[kept], ideas, similarity_AA),
        "kl": kl(np.array(state.logits), np.array(start.logits)),
    }
