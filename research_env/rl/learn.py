"""The loop of the thesis with a learner that is a policy: ideas are sampled, carried out, valued, and the policy moves.

The disease to watch for is that of arXiv 2601.14525, section 5: the mean rises, the maximum does not, and two safe ideas take
the whole batch. A variant says which reward, which advantage and which bonuses are to cure it.
"""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from pretrain.config import ConfigError, stable_seed
from research_env.rl.bandit import Bandit
from research_env.rl.credit import ADVANTAGES, REWARDS, Advantage, Reward, advantages_P, rewards_of, shaped_P
from research_env.rl.measure import measure, similarities_AA
from research_env.rl.policy import PolicyState, sample, update
from research_env.schedule import CannotGoOn


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """How a policy learns. Bonuses: see `credit.shaped_P` (in units of the reward) and `policy.gradient_A` (entropy)."""

    name: str
    reward: Reward = "paper"
    advantage: Advantage = "grpo"
    entropy_weight: float = 0.0
    count_weight: float = 0.0
    novelty_weight: float = 0.0
    # Of plain ascent on the logits, where an idea with a share s of the samples and advantage 1 moves by rate * s. 0 is
    # best-of-N: the starting policy, sampled again and again.
    learning_rate: float = 8.0

    def __post_init__(self) -> None:
        faults = []
        if self.reward not in REWARDS:
            faults.append(f"reward must be one of {', '.join(REWARDS)}, got {self.reward!r}")
        if self.advantage not in ADVANTAGES:
            faults.append(f"advantage must be one of {', '.join(ADVANTAGES)}, got {self.advantage!r}")
        for name in ("entropy_weight", "count_weight", "novelty_weight", "learning_rate"):
            if not getattr(self, name) >= 0:
                faults.append(f"{name} must be at least 0, got {getattr(self, name)}")
        if not self.name.strip():
            faults.append("name must say which variant this is, got nothing")
        if faults:
            raise ConfigError(*faults)


@dataclasses.dataclass(frozen=True)
class Learned:
    """Where a policy stands, and the numbers of the epochs that led there."""

    state: PolicyState
    epochs: tuple[Mapping[str, float], ...]


def learn(
    bandit: Bandit,
    variant: Variant,
    *,
    seed: int,
    num_epochs: int,
    samples_per_epoch: int,
    shares_seed: bool,
    state: PolicyState | None = None,
    on_epoch: Callable[[int, Mapping[str, float]], None] = lambda epoch, numbers: None,
) -> Learned:
    """Learn until `num_epochs` are finished, from the start or from a `state` of an earlier call with the same arguments.

    Everything random in an epoch derives from (seed, epoch), so going on from a state equals never having stopped, bit for
    bit. `shares_seed` gives all runs of an epoch one seed, so that equal ideas are one run; else each sample has its own.

    Raises:
      OutOfBudget: before anything is spent.
      CannotGoOn: the host failed on every run of an epoch.
    """
    start = PolicyState.start(bandit.start_probs_A)
    state = state or start
    similarity_AA = similarities_AA(bandit.ideas)
    records = []
    while state.epoch < num_epochs:
        epoch = state.epoch
        picks_P = sample(state, samples_per_epoch, np.random.default_rng(stable_seed(seed, "ideator", epoch)))
        slots = [0] * samples_per_epoch if shares_seed else range(samples_per_epoch)
        # Drawn after the ideas are known, as every seed of the harness.
        results = bandit.pull(picks_P, [stable_seed(seed, "run", epoch, slot) for slot in slots])
        if not any(result.status.is_sample for result in results):
            raise CannotGoOn(f"the host failed on all runs of epoch {epoch}: {results[0].reason}")
        numbers = measure(picks_P, results, state, start, bandit.ideas, similarity_AA)
        rewards_P = shaped_P(
            rewards_of(results, variant.reward), picks_P, np.array(state.visits),
            count_weight=variant.count_weight, novelty_weight=variant.novelty_weight,
        )  # fmt: skip
        state = update(
            state, picks_P, advantages_P(rewards_P, variant.advantage),
            learning_rate=variant.learning_rate, entropy_weight=variant.entropy_weight,
        )  # fmt: skip
        if bandit.best is not None:
            numbers["best_idea_chance"] = float(state.probs_A[bandit.best])
        records.append(numbers)
        on_epoch(epoch, numbers)
    return Learned(state, tuple(records))
