"""A softmax policy over a list of ideas, small enough that its gradients are exact and an epoch costs a millisecond.

A ideas, P samples of an epoch.
"""

import dataclasses

import numpy as np

from research_env.records import Record


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyState(Record):
    """All that learning carries from one epoch to the next; it goes to JSON and back without loss."""

    epoch: int  # finished epochs
    logits: tuple[float, ...]  # [A]
    visits: tuple[int, ...]  # [A], how often each idea was sampled so far

    def __post_init__(self) -> None:
        object.__setattr__(self, "logits", tuple(float(x) for x in self.logits))
        object.__setattr__(self, "visits", tuple(int(x) for x in self.visits))
        assert len(self.logits) == len(self.visits) > 0, "one logit and one count for each idea"

    @classmethod
    def start(cls, probs_A: np.ndarray) -> "PolicyState":
        """The policy before it learned anything; every idea needs a chance above 0, or it is never found."""
        assert np.all(probs_A > 0), "the logarithm of a chance of 0 is no logit"
        return cls(epoch=0, logits=tuple(np.log(probs_A).tolist()), visits=(0,) * len(probs_A))

    @property
    def probs_A(self) -> np.ndarray:
        """Chances of the ideas, float64 [A]."""
        return np.exp(log_softmax(np.array(self.logits)))


def log_softmax(logits_A: np.ndarray) -> np.ndarray:
    """Logarithms of the chances, float64 [A]."""
    shifted_A = logits_A - logits_A.max()
    return shifted_A - np.log(np.exp(shifted_A).sum())


def entropy(logits_A: np.ndarray) -> float:
    """In nats."""
    logp_A = log_softmax(logits_A)
    return float(-(np.exp(logp_A) * logp_A).sum())


def kl(logits_A: np.ndarray, reference_A: np.ndarray) -> float:
    """KL(policy || reference) in nats, both given by logits."""
    logp_A = log_softmax(logits_A)
    return float((np.exp(logp_A) * (logp_A - log_softmax(reference_A))).sum())


def sample(state: PolicyState, count: int, rng: np.random.Generator) -> np.ndarray:
    """Indices of `count` ideas, int64 [P]."""
    return rng.choice(len(state.logits), size=count, p=state.probs_A)


def gradient_A(
    logits_A: np.ndarray, picks_P: np.ndarray, advantages_P: np.ndarray, entropy_weight: float
) -> np.ndarray:
    """Gradient of mean(advantage * log-probability) + entropy_weight * entropy in the logits, float64 [A].

    One step on fresh samples, so the ratio of GRPO (arXiv 2402.03300, equation 3) is 1 and clipping has nothing to clip.
    d log p_i / d logit_a = [i = a] - p_a, and d entropy / d logit_a = -p_a (log p_a + entropy).
    """
    logp_A = log_softmax(logits_A)
    probs_A = np.exp(logp_A)
    per_idea_A = np.bincount(picks_P, weights=advantages_P, minlength=len(logits_A)) / len(picks_P)
    surrogate_A = per_idea_A - probs_A * per_idea_A.sum()
    entropy_A = -probs_A * (logp_A - (probs_A * logp_A).sum())
    return surrogate_A + entropy_weight * entropy_A


def update(
    state: PolicyState,
    picks_P: np.ndarray,
    advantages_P: np.ndarray,
    *,
    learning_rate: float,
    entropy_weight: float,
) -> PolicyState:
    """The state after one ascent step on an epoch's samples."""
    logits_A = np.array(state.logits)
    moved_A = logits_A + learning_rate * gradient_A(logits_A, picks_P, advantages_P, entropy_weight)
    visits_A = np.array(state.visits) + np.bincount(picks_P, minlength=len(logits_A))
    return PolicyState(epoch=state.epoch + 1, logits=tuple(moved_A.tolist()), visits=tuple(visits_A.tolist()))
