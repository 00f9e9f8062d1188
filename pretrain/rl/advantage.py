"""How much better than its group a sample is: the estimators of policy gradients with a group as baseline.

Q prompts, P samples of each. A reward that is NaN belongs to a sample that was dropped: it counts nowhere.
"""

from typing import Literal

import numpy as np

from pretrain.config import ConfigError

Estimator = Literal["grpo", "mean", "rloo"]
ESTIMATORS = ("grpo", "mean", "rloo")

# Of the group's largest reward. A group in which every reward is the same teaches nothing; rounding must not be
# divided by rounding, in whatever unit rewards are.
_MIN_DEVIATION = 1e-6


def advantages(rewards_QP: np.ndarray, estimator: Estimator) -> np.ndarray:
    """The advantage of each sample, float64 [Q, P]; they sum to zero in each group, and dropped samples get 0.

    grpo: (r - mean) / deviation, as in GRPO (arXiv 2402.03300, section 4.1.2). mean: r - mean, as in Dr. GRPO
    (arXiv 2503.20783), whose point is that the division favors groups that are nearly solved or nearly hopeless.
    rloo: r minus the mean of the others (arXiv 2402.14740), which is `mean` times P / (P - 1).
    """
    if estimator not in ESTIMATORS:
        raise ConfigError(f"the estimator must be one of {', '.join(ESTIMATORS)}, got {estimator!r}")
    rewards_QP = np.asarray(rewards_QP, np.float64)
    kept_QP = np.isfinite(rewards_QP)
    count_Q1 = kept_QP.sum(axis=1, keepdims=True)
    values_QP = np.where(kept_QP, rewards_QP, 0.0)
    mean_Q1 = values_QP.sum(axis=1, keepdims=True) / np.maximum(count_Q1, 1)
    centered_QP = np.where(kept_QP, rewards_QP - mean_Q1, 0.0)
    if estimator == "mean":
        return centered_QP
    if estimator == "rloo":
        return centered_QP * count_Q1 / np.maximum(count_Q1 - 1, 1)
    deviation_Q1 = np.sqrt(np.square(centered_QP).sum(axis=1, keepdims=True) / np.maximum(count_Q1, 1))
    is_different_Q1 = deviation_Q1 > _MIN_DEVIATION * np.abs(values_QP).max(axis=1, keepdims=True)
    return np.where(is_different_Q1, centered_QP / np.where(is_different_Q1, deviation_Q1, 1.0), 0.0)
