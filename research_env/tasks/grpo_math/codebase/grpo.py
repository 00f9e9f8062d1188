"""GRPO (arXiv 2402.03300) on a small policy: advantages of a group, the clipped surrogate, its gradient.

Q problems, P samples of each, A characters of an answer, V vocabulary.
"""

import model
import numpy as np

ESTIMATOR = "grpo"  # grpo, mean, rloo
CLIP_LOW = 0.2
CLIP_HIGH = 0.2


def advantages(rewards_QP):
    """How much better than its group each sample is; sums to zero in a group."""
    centered_QP = rewards_QP - rewards_QP.mean(1, keepdims=True)
    if ESTIMATOR == "mean":
        return centered_QP
    if ESTIMATOR == "rloo":
        return centered_QP * rewards_QP.shape[1] / (rewards_QP.shape[1] - 1)
    return centered_QP / (rewards_QP.std(1, keepdims=True) + 1e-4)


def gradient(params, tokens_BT, old_logp_BA, advantage_B):
    """Gradient of minus the clipped surrogate, mean over characters."""
    total = {name: np.zeros_like(value) for name, value in params.items()}
    count = tokens_BT.shape[0] * model.ANSWER
    rows = np.arange(len(tokens_BT))
    for place in range(model.ANSWER):
        at = model.LENGTH - model.ANSWER + place
        prefix_BT = tokens_BT.copy()
        prefix_BT[:, at:] = model.PAD
        logits_BV, kept = model.forward(params, prefix_BT)
        logp_BV = model.log_softmax(logits_BV)
        ratio_B = np.exp(logp_BV[rows, tokens_BT[:, at]] - old_logp_BA[:, place])
        is_clipped = np.where(advantage_B > 0, ratio_B > 1 + CLIP_HIGH, ratio_B < 1 - CLIP_LOW)
        weight_B = np.where(is_clipped, 0.0, ratio_B * advantage_B) / count
        d_logits_BV = np.exp(logp_BV) * weight_B[:, None]
        d_logits_BV[rows, tokens_BT[:, at]] -= weight_B
        for name, value in model.backward(params, kept, d_logits_BV.astype(np.float32)).items():
            total[name] += value
    return total
