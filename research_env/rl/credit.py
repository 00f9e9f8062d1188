"""From the results of an epoch to advantages: rewards, what new ideas earn on top, and who counts.

A ideas, P samples of an epoch. NaN marks a sample that says nothing about its idea (the host failed, or the run was
preempted): it counts nowhere and gets the advantage 0.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from pretrain.config import ConfigError
from pretrain.rl.advantage import advantages
from research_env.records import Result
from research_env.reward import failure_separated_rewards, paper_rewards, rank_rewards

Reward = Literal["paper", "rank", "failure_separated"]
REWARDS = {"paper": paper_rewards, "rank": rank_rewards, "failure_separated": failure_separated_rewards}
Advantage = Literal["grpo", "top_k"]
ADVANTAGES = ("grpo", "top_k")
TOP_SHARE = 16  # top_k: the best 1/16 of the samples count


def rewards_of(results: Sequence[Result], reward: Reward) -> np.ndarray:
    """The rewards of one group, float64 [P], NaN where the result is not a sample.

    Raises:
      ConfigError: the paper's 1/metric of a metric that is not positive; every run measures it.
    """
    rewards_P = np.array(REWARDS[reward](results), np.float64)
    if not np.isfinite(rewards_P).all():
        worst = min(result.metric for result in results if result.metric is not None)
        raise ConfigError(
            f"values are 1/metric and need positive metrics, got {worst}; let the evaluator report a positive one"
        )
    rewards_P[[not result.status.is_sample for result in results]] = np.nan
    return rewards_P


def shaped_P(
    rewards_P: np.ndarray,
    picks_P: np.ndarray,
    visits_A: np.ndarray,
    *,
    count_weight: float,
    novelty_weight: float,
) -> np.ndarray:
    """Rewards less `count_weight` times the idea's share of this epoch, plus `novelty_weight` / sqrt(1 + earlier visits).

    Shares, so that the weight means the same in a group of any size. The second is the bonus of count-based exploration
    (Strehl and Littman 2008, MBIE-EB), over all earlier epochs; the first looks at this epoch alone.
    """
    kept_P = np.isfinite(rewards_P)
    counts_A = np.bincount(picks_P[kept_P], minlength=len(visits_A))
    share_P = counts_A[picks_P] / max(int(kept_P.sum()), 1)
    return rewards_P - count_weight * share_P + novelty_weight / np.sqrt(1.0 + visits_A[picks_P])


def advantages_P(rewards_P: np.ndarray, kind: Advantage) -> np.ndarray:
    """Float64 [P], sum 0, and deviation 1 unless all are equal.

    grpo: (reward - mean) / deviation. top_k: the same of "is among the best 1/16", so that how much a mediocre sample
    beats a bad one teaches nothing; samples that tie at the border share the places that are left, whatever their order.
    """
    scores_P = top_P(rewards_P) if kind == "top_k" else rewards_P
    return advantages(scores_P[None], "grpo")[0]


def top_P(rewards_P: np.ndarray) -> np.ndarray:
    """1 for samples among the best 1/16 (at least one), a share at the border, else 0; NaN stays."""
    kept = rewards_P[np.isfinite(rewards_P)]
    if not len(kept):
        return rewards_P
    places = max(1, len(kept) // TOP_SHARE)
    border = np.sort(kept)[-places]
    above, equal = int((kept > border).sum()), int((kept == border).sum())
    scores_P = np.where(rewards_P > border, 1.0, np.where(rewards_P == border, (places - above) / equal, 0.0))
    return np.where(np.isfinite(rewards_P), scores_P, np.nan)
