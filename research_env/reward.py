"""From a result to a number that a learner can use: pure functions, each keeping failures below successes.

`paper_rewards` is that of arXiv 2601.14525 (1/loss, or the accuracy; 0 for a failure). It makes "runs at all" worth most of
what a great idea is worth, hence the other two.
"""

import math
from collections.abc import Sequence

from research_env.records import Result, Status


def paper_rewards(results: Sequence[Result]) -> list[float]:
    """1/metric when lower is better, the metric itself otherwise; failures 0. Metrics must be positive."""
    rewards = []
    for result in results:
        if result.metric is None:
            rewards.append(0.0)
        elif result.higher_is_better:
            rewards.append(max(result.metric, 0.0))
        else:
            rewards.append(1.0 / result.metric if result.metric > 0 else math.inf)
    return rewards


def rank_rewards(results: Sequence[Result]) -> list[float]:
    """Rank among the successes, in (0, 1]; failures 0. Ties share the mean rank."""
    return _ranked(results, failure=0.0)


def failure_separated_rewards(results: Sequence[Result], penalty: float = 0.1) -> list[float]:
    """Successes ranked among themselves around 0, in [-0.5, 0.5] by rank minus one half; a failure costs below them all.

    The spread among successes does not depend on how many failed, so a group of failures does not make a mediocre run
    look great.
    """
    return [
        reward - 0.5 if result.metric is not None else -0.5 - penalty
        for reward, result in zip(_ranked(results, failure=0.0), results, strict=True)
    ]


def _ranked(results: Sequence[Result], failure: float) -> list[float]:
    scores = [_oriented(result) for result in results if result.status is Status.OK]
    count = len(scores)
    rewards = []
    for result in results:
        if result.status is not Status.OK:
            rewards.append(failure)
            continue
        score = _oriented(result)
        below = sum(other < score for other in scores)
        equal = sum(other == score for other in scores)
        rewards.append((below + (equal + 1) / 2) / count)
    return rewards


def _oriented(result: Result) -> float:
    assert result.metric is not None
    return result.metric if result.higher_is_better else -result.metric
