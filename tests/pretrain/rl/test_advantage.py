"""Advantages: centered in every group, dropped samples count nowhere, the three estimators as published."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from pretrain.config import ConfigError
from pretrain.rl.advantage import ESTIMATORS, advantages

REWARDS = st.lists(
    st.lists(st.one_of(st.floats(-5, 5, width=32), st.just(float("nan"))), min_size=4, max_size=4),
    min_size=1,
    max_size=5,
)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@hypothesis.given(rewards=REWARDS)
def test_each_group_sums_to_zero_and_dropped_samples_have_none(estimator, rewards):
    rewards_QP = np.array(rewards)
    found = advantages(rewards_QP, estimator)
    assert np.abs(found.sum(axis=1)).max() < 1e-6
    assert (found[np.isnan(rewards_QP)] == 0).all()


@hypothesis.given(rewards=REWARDS)
def test_a_dropped_sample_changes_no_other(rewards):
    rewards_QP = np.array(rewards)
    rewards_QP[:, 0] = np.nan
    for estimator in ESTIMATORS:
        whole, without = advantages(rewards_QP, estimator), advantages(rewards_QP[:, 1:], estimator)
        assert np.allclose(whole[:, 1:], without, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e6, 1e18])
def test_the_unit_of_a_reward_says_nothing_to_grpo(scale):
    rewards_QP = np.array([[1.0, 0.0, 0.25, np.nan], [0.1, 0.1, 0.1 * (1 + 1e-15), 0.1]])
    found = advantages(scale * rewards_QP, "grpo")
    assert np.allclose(found, advantages(rewards_QP, "grpo"), rtol=1e-9)
    assert found[0].any()
    assert not found[1].any(), "rounding is no difference"


def test_by_hand():
    rewards_QP = np.array([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    assert advantages(rewards_QP, "mean").tolist() == [[0.75, -0.25, -0.25, -0.25], [0.0] * 4]
    assert np.allclose(advantages(rewards_QP, "rloo")[0], [1.0, -1 / 3, -1 / 3, -1 / 3])
    assert np.allclose(
        advantages(rewards_QP, "grpo")[0], np.array([0.75, -0.25, -0.25, -0.25]) / np.sqrt(0.1875)
    )
    assert (advantages(rewards_QP, "grpo")[1] == 0).all()


def test_an_unknown_estimator_is_refused():
    with pytest.raises(ConfigError, match="grpo, mean, rloo"):
        advantages(np.ones((1, 2)), "best")
