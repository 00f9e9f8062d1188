"""The promotion rule against simulation: improvements are found, luck is not promoted."""

import numpy as np
import pytest

from research_env.choose import (
    Halving,
    Noise,
    confirm,
    estimate_prior_sigma,
    f_quantile,
    judge_gains,
    luck_of_best,
    passes_screen,
    posterior_mean,
    student_t_quantile,
)
from research_env.records import Result, Status
from research_env.reward import failure_separated_rewards, paper_rewards, rank_rewards
from research_env.search.explore_exploit import exploit_count


def promoted_share(true_gain: float, num_campaigns: int, scatter: float = 1.0) -> float:
    """Share of candidates with this true gain and own noise (in sigma0) that the rule promotes, with 16 repeats."""
    rng = np.random.default_rng(0)
    count = 0
    for _ in range(num_campaigns):
        repeats = rng.normal(0, 1, 16)
        noise = Noise.of(repeats)
        if passes_screen(true_gain + scatter * rng.normal() - repeats.mean(), noise):

            def run_pairs(first, last):
                mine = rng.normal(true_gain, scatter, last - first)
                return list(mine - rng.normal(0, 1, last - first))

            count += confirm(run_pairs, noise, 0.0).decision == "promote"
    return count / num_campaigns


def test_two_sigma_improvements_are_found_and_nulls_are_not_promoted():
    # Standard errors of the shares are 0.7 and 0.3 points at 3000 campaigns.
    assert promoted_share(2.0, 3000) >= 0.80
    assert promoted_share(0.0, 3000) <= 0.05


@pytest.mark.parametrize("scatter", [0.5, 3.0, 10.0])
def test_a_null_with_noise_of_its_own_is_not_promoted_for_its_luck(scatter):
    # By sigma0 alone 13 % and 23 % of the noisy ones were.
    assert promoted_share(0.0, 1500, scatter) <= 0.06


def test_a_metric_without_noise_is_judged_by_the_scatter_of_the_gains():
    still = Noise(0.0, 8)
    assert judge_gains([0.1, 0.1, 0.1], still, 0.0, is_last=False).decision == "promote"
    assert judge_gains([0.9, -0.4, 0.1], still, 0.0, is_last=False).decision == "continue"


def test_the_spread_of_true_gains_is_found_below_the_noise():
    rng = np.random.default_rng(0)
    repeats = rng.normal(0, 1, 9)
    noise = Noise(1.0, 9)
    gains = rng.normal(0, 0.5, 4000) + rng.normal(0, 1, 4000) - repeats.mean()
    assert estimate_prior_sigma(gains - gains.mean(), Noise(1.0, 10**6)) == pytest.approx(0.5, abs=0.05)
    spread = [
        estimate_prior_sigma(rng.normal(0, 0.5, 40) + rng.normal(0, 1, 40) - rng.normal(0, 1 / 3), noise) ** 2
        for _ in range(400)
    ]
    assert np.mean(spread) == pytest.approx(0.25, abs=0.05)


@pytest.mark.parametrize(("above", "below", "quantile"), [(2, 7, 6.5415), (4, 15, 3.8043), (7, 8, 4.5286)])
def test_quantiles_of_a_ratio_of_variances(above, below, quantile):
    assert f_quantile(0.975, above, below) == pytest.approx(quantile, rel=1e-4)


@pytest.mark.parametrize(("count", "sigmas"), [(1, 0.0), (10, 1.54), (80, 2.43), (500, 3.04), (800, 3.18)])
def test_the_luck_of_the_best_of_n(count, sigmas):
    assert luck_of_best(count) == pytest.approx(sigmas, abs=0.01)


@pytest.mark.parametrize(
    ("degrees", "quantile"), [(1, 12.7062), (7, 2.36462), (15, 2.13145), (1000, 1.96234)]
)
def test_student_quantiles(degrees, quantile):
    assert student_t_quantile(0.975, degrees) == pytest.approx(quantile, rel=1e-4)


def test_shrinkage_lies_between_nothing_and_the_raw_gain():
    noise = Noise(1.0, 8)
    assert 0 < posterior_mean(2.0, 1, noise, 1.0) < posterior_mean(2.0, 5, noise, 1.0) < 2.0


def test_halving_costs_little_and_keeps_a_clear_best():
    halving, cost = Halving(4), 0.0
    fractions = (1 / 27, 1 / 9, 1 / 3, 1.0)
    queue = [(f"c{i}", 0) for i in range(81)]
    reached = set()
    while queue:
        for name, rung in queue:
            cost += fractions[rung]
            halving.tell(name, rung, -int(name[1:]))
            if rung == 3:
                reached.add(name)
        queue = halving.climbers()
    assert reached == {"c0", "c1", "c2"}
    assert cost / 81 <= 0.15
    assert len(halving.killed()) == 78


def test_the_papers_exploit_counts():
    assert [exploit_count(e, 80) for e in range(10)] == [0, 40, 40, 40, 50, 50, 60, 60, 60, 60]
    assert [exploit_count(e, 50) for e in range(7)] == [0, 20, 30, 30, 30, 30, 40]


def test_rewards_are_monotone_and_no_failure_outranks_a_success():
    metrics = [3.2, 3.5, None, 3.2, None, 9.0]
    results = [
        Result(status=Status.RUN_CRASH) if m is None else Result(status=Status.OK, metric=m) for m in metrics
    ]  # fmt: skip
    for rule in (paper_rewards, rank_rewards, failure_separated_rewards):
        rewards = rule(results)
        assert rewards[0] == rewards[3] > rewards[1] > rewards[5] > max(rewards[2], rewards[4])
