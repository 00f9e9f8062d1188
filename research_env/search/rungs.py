"""Successive halving across programs: all run short, the best third of each rung runs on, the rest end there.

After ASHA (arXiv 1810.05934): a candidate climbs when it is in the top 1/eta of all that its arm has scored at that rung. Ours
decides batch by batch and never resumes who was told to have ended, so that a search hears of each candidate once and a
replay is exact; the price is that early batches are judged by few. A rung's score is the judge's, on a run that was planned
for that length (`$RUNG`), never the streamed loss. Runs start anew at each rung: a checkpoint that the candidate's own code
would read back is nothing to build a score on. So every rung is paid for whole, and each costs all candidates together as much
as the lowest does: four rungs from 1/27 are 4/27 = 14.8 % of running all at full length, three from 1/9 are 33 %.
"""

import collections
import dataclasses
import json
import random
from collections.abc import Sequence

from pretrain.config import ConfigError, stable_seed
from research_env.choose import Halving
from research_env.env import AIResearchEnv, Candidate
from research_env.records import Result, Status, digest

COSTS = ("wall_s", "judge_s", "device_s", "cpu_s")  # what several runs of one candidate add up


@dataclasses.dataclass(frozen=True, kw_only=True)
class HalvingConfig:
    """`eta`: one of so many climbs. `survivor_share` of those to be ended run on, to measure how often ending was wrong.

    The measurement comes on top of what halving costs: at 0.05 it takes 5 to 7 runs of full length for 100 candidates.
    """

    eta: int = 3
    survivor_share: float = 0.05

    def __post_init__(self) -> None:
        faults = []
        if self.eta < 2:
            faults.append(f"halving.eta must be at least 2, got {self.eta}")
        if not 0.0 <= self.survivor_share < 1.0:
            faults.append(f"halving.survivor_share must lie in [0, 1), got {self.survivor_share}")
        if faults:
            raise ConfigError(*faults)


class Rungs:
    """Evaluates the candidates of one arm; its state is a function of what it was given, in order."""

    def __init__(self, env: AIResearchEnv, config: HalvingConfig, arm: str, seed: int):
        if len(env.task.rungs) < 2:
            raise ConfigError(
                f"halving needs a task with rungs below 1.0, {env.task.name} has {env.task.rungs}; "
                "add rungs = [0.1, 0.3, 1.0] to its task.toml and let run.sh obey $RUNG"
            )
        self._env, self._config, self._arm, self._seed = env, config, arm, seed
        self._halving = Halving(len(env.task.rungs), config.eta)
        self.survivors: set[str] = set()  # node ids that ran on although they were to be ended

    def evaluate(self, candidates: Sequence[Candidate], *, purpose: str = "screen") -> list[Result]:
        """Results in order: a failure as it is, OK for who reached the top, else EARLY_KILLED with rung and rank.

        `device_s`, `cpu_s`, `wall_s` and `judge_s` are those of all rungs together.

        Raises:
          OutOfBudget: before anything new is spent at a rung.
        """
        rungs = self._env.task.rungs
        results: dict[int, Result] = {}
        spent: dict[int, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        running = list(range(len(candidates)))
        for number, rung in enumerate(rungs):
            is_top = number == len(rungs) - 1
            found = self._env.evaluate(
                [candidates[i] for i in running], rung=rung, purpose=purpose if is_top else "rung"
            )
            passed = []
            for index, result in zip(running, found, strict=True):
                for name in COSTS:
                    spent[index][name] += getattr(result, name)
                results[index] = result
                if result.metric is not None:
                    name = candidates[index].node.id
                    if name not in self.survivors:  # who is only measured takes nobody's place
                        score = result.metric if result.higher_is_better else -result.metric
                        self._halving.tell(name, number, score)
                    passed.append(index)
            if is_top:
                break
            climbing = {name for name, to in self._halving.climbers() if to == number + 1}
            running = []
            for index in passed:
                name = candidates[index].node.id
                if name in climbing or name in self.survivors:
                    running.append(index)
                elif self._survives(name):
                    self.survivors.add(name)
                    self._env.ledger.note("survivor", name, json.dumps({"arm": self._arm, "rung": rung}))
                    running.append(index)
                else:
                    results[index] = self._end(candidates[index], results[index], number, purpose)
        return [dataclasses.replace(results[i], **spent[i]) for i in range(len(candidates))]

    def _survives(self, name: str) -> bool:
        draw = random.Random(stable_seed(self._seed, self._arm, "survivor", name)).random()
        return draw < self._config.survivor_share

    def _end(self, candidate: Candidate, result: Result, number: int, purpose: str) -> Result:
        """The verdict as a row of the ledger, beside the rung's own."""
        rung = self._env.task.rungs[number]
        place, count = self._halving.place(candidate.node.id, number)
        key = digest("early_killed", self._arm, result.run_key)[:32]
        ended = dataclasses.replace(
            result,
            status=Status.EARLY_KILLED,
            metric=None,
            reason=f"ended at rung {rung:.3g} of the budget: {place} of {count} there",
            run_key=key,
        )
        ledger = self._env.ledger
        state = ledger.enqueue(
            key, node=candidate.node.id, purpose=purpose, tree=candidate.node.tree_digest, seed=result.seed, rung=rung,
            resource=str(self._env.resource),
        )  # fmt: skip
        if state != "DONE":
            ledger.finish(key, ended)
        recorded = ledger.result(key)
        assert recorded is not None, "finished above"
        return recorded
