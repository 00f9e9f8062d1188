"""What sampled ideas are worth: carried out as diffs, run in the sandbox of AIResearchEnv, judged, rewarded as a group.

The process of the policy runs no candidate and computes no metric; it turns the judge's results into rewards.

P samples of a group, A different ideas.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pretrain.config import ConfigError, stable_seed
from pretrain.rl.grader import Grade
from pretrain.rl.problem import Problem
from research_env.env import AIResearchEnv, Candidate
from research_env.novelty import syntax_digest
from research_env.records import Idea, Result, digest, tree_digest
from research_env.rl.carry_out import Executor
from research_env.rl.credit import Advantage, Reward, rewards_of, shaped_P, top_P
from research_env.rl.measure import diversity, outcomes, similarities_AA, wording
from research_env.schedule import CannotGoOn, OutOfBudget

EPOCH = "rl epoch"  # the kind of the ledger's events


class ExecutedIdeas:
    """The valuer of an ideator that learns.

    What an epoch was, visits of each idea and its best, is an event of the ledger under its first step, so that
    counts over earlier epochs survive a restart, and steps that are repeated after one count once.
    """

    def __init__(
        self,
        env: AIResearchEnv,
        executor: Executor,
        *,
        samples_per_group: int,
        seed: int,
        reward: Reward,
        advantage: Advantage,
        count_weight: float,
        novelty_weight: float,
    ):
        self._env, self._executor, self._seed, self._P = env, executor, seed, samples_per_group
        self._reward: Reward = reward
        self._advantage: Advantage = advantage
        self._count_weight, self._novelty_weight = count_weight, novelty_weight
        self._baseline = tree_digest(env.task.baseline)
        self._report: dict[str, Any] = {}

    def value(self, step: int, items: Sequence[tuple[Problem, str]]) -> list[Grade]:
        """Rewards of the samples that the rollout of `step` brought; a fault of the host drops its sample.

        All runs of an epoch share a seed, drawn when the ideas are known, so that equal ideas are one run.

        Raises:
          ConfigError: the budget is used up; nothing of the epoch was spent.
          CannotGoOn: the host failed on every run.
        """
        texts = [text.strip() for _, text in items]
        candidates = {text: self.candidate(text, step) for text in dict.fromkeys(texts)}
        seed = stable_seed(self._seed, "rl run", step)
        try:
            results = self._env.evaluate_pairs([(candidates[text], seed) for text in texts])
        except OutOfBudget as error:
            raise ConfigError(
                f"{error}; raise data.budget, the run goes on from its last checkpoint"
            ) from error
        if not any(result.status.is_sample for result in results):
            raise CannotGoOn(f"the host failed on all runs of step {step}: {results[0].reason}")
        names = [self._meaning(candidates[text], text) for text in texts]
        index = {name: i for i, name in enumerate(dict.fromkeys(names))}
        picks = np.array([index[name] for name in names])
        earlier = self._epochs_before(step)
        visits_A = np.array([sum(epoch["visits"].get(name, 0) for epoch in earlier) for name in index])
        grades = []
        for first in range(0, len(items), self._P):
            group = slice(first, first + self._P)
            rewards_P = shaped_P(
                rewards_of(results[group], self._reward), picks[group], visits_A,
                count_weight=self._count_weight, novelty_weight=self._novelty_weight,
            )  # fmt: skip
            grades += self._grades(rewards_P)
        self._describe(step, texts, results, picks, names, earlier)
        return grades

    def candidate(self, text: str, step: int) -> Candidate:
        """The idea as a diff against the baseline; one that changes nothing is refused, for the baseline is no idea."""
        fields = {"idea": text, "operator": "policy", "arm": "rl", "key": "rl", "epoch": step}
        found = self._env.add(self._executor.carry_out(text) or "the idea changes nothing", **fields)
        if found.node.tree_digest == self._baseline:
            return self._env.add("the idea changes nothing", **fields)
        return found

    def report(self) -> dict[str, Any]:
        """The numbers of the last epoch, as `ideas`."""
        return {"ideas": self._report}

    def close(self) -> None:
        """Let the campaign's folder go."""
        self._env.close()

    def _grades(self, rewards_P: np.ndarray) -> list[Grade]:
        """top_k: whether a sample is among the best of its group takes the place of its reward."""
        scores_P = top_P(rewards_P) if self._advantage == "top_k" else rewards_P
        return [
            Grade(float(score)) if np.isfinite(score) else Grade(None, "the host failed")
            for score in scores_P
        ]

    def _meaning(self, candidate: Candidate, text: str) -> str:
        """What makes two ideas one: the same resulting code, and for what gives none the same words."""
        if candidate.tree is None:
            return digest("words", " ".join(text.lower().split()))
        return syntax_digest(candidate.tree)

    def _epochs_before(self, step: int) -> list[Mapping[str, Any]]:
        return [json.loads(detail) for key, detail in self._env.ledger.events(EPOCH) if int(key) < step]

    def _describe(
        self,
        step: int,
        texts: Sequence[str],
        results: Sequence[Result],
        picks: np.ndarray,
        names: Sequence[str],
        earlier: Sequence[Mapping[str, Any]],
    ) -> None:
        kept = [i for i, result in enumerate(results) if result.status.is_sample]
        good = [results[i] for i in kept]
        words = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        ideas = [Idea(text=text) for text in words]
        values = rewards_of(good, "paper")
        best = kept[int(values.argmax())]
        numbers = {
            **outcomes(good),
            **diversity(np.bincount(picks[kept])),
            **wording(np.array([words[texts[i]] for i in kept]), ideas, similarities_AA(ideas)),
        }
        epoch = {
            "visits": {name: int((picks[kept] == picks[names.index(name)]).sum()) for name in dict.fromkeys(names)},
            "value": float(values.max()), "idea": texts[best], "metric": results[best].metric,
        }  # fmt: skip
        if str(step) not in {key for key, _ in self._env.ledger.events(EPOCH)}:
            self._env.ledger.note(EPOCH, str(step), json.dumps(epoch))
        numbers["best_so_far"] = max(item["value"] for item in (*earlier, epoch))
        self._report = numbers


def best_epoch(env: AIResearchEnv) -> Mapping[str, Any]:
    """The best idea of all epochs: its `value` (the paper's reward), `idea` and `metric`; none before the first epoch."""
    epochs = [json.loads(detail) for _, detail in env.ledger.events(EPOCH)]
    return max(epochs, key=lambda epoch: epoch["value"], default={"value": 0.0, "idea": "", "metric": None})
