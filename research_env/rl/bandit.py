"""A list of ideas as a bandit: each pull carries an idea out and returns what that was worth.

`PlantedBandit` knows the truth and costs microseconds; `CodebaseBandit` runs real diffs in the jail of AIResearchEnv.
A pull is a pure function of (idea, seed), so a run that is repeated sees the same results.
"""

import dataclasses
import runpy
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pretrain.config import ConfigError, stable_seed
from research_env.diff import emit_diff, make_diff, read_change
from research_env.env import AIResearchEnv
from research_env.ideator.mutate import MutationIdeas, find_sites, replace_values
from research_env.novelty import syntax_digest
from research_env.records import Idea, Resource, Result, Status
from research_env.rl.credit import rewards_of
from research_env.sandbox.ladder import SandboxConfig
from research_env.schedule import Budget
from research_env.task import Task, open_task

# The planted bandit. Ideas that change little nearly always run; the great one changes two things, is rarely thought of and
# fails more often than not, like the complicated changes that make most failures in arXiv 2601.14525, section 4.
SAFE = ({"CLIP": 0.5}, {"WARMUP": 50})
BEST = {"WIDTH": 128, "DEPTH": 6}
SAFE_CHANCE, SAFE_SHARE = 0.97, 0.15  # chance to run; share of both together in the starting policy
BEST_CHANCE, BEST_SHARE = 0.3, 0.003
OTHER_CHANCES = (0.2, 0.8)  # of all others, drawn evenly
_MAX_TRIES = 50  # draws for each idea that is asked for


class Bandit(Protocol):
    """Ideas, how often an untrained ideator has each, and their execution."""

    ideas: Sequence[Idea]
    start_probs_A: np.ndarray
    baseline_value: float  # the paper's reward of the unchanged code
    best: int | None  # the best idea, where the truth is known

    def pull(self, picks_P: np.ndarray, seeds: Sequence[int]) -> list[Result]:
        """Carry out each sampled idea with its own seed.

        Raises:
          OutOfBudget: before anything is spent.
        """
        ...


# --- with known effects


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlantedBanditConfig:
    """The `planted` task's truth and noise without processes: two safe ideas, one rare and best, the rest no better than safe."""

    num_ideas: int = 60

    def __post_init__(self) -> None:
        if not 4 <= self.num_ideas <= 200:
            raise ConfigError(f"num_ideas must lie in [4, 200], got {self.num_ideas}")

    @contextmanager
    def open(self, seed: int, workdir: Path) -> Iterator["PlantedBandit"]:
        """The bandit of this seed: the other ideas and their chances are drawn anew for each."""
        with tempfile.TemporaryDirectory() as folder:
            task = open_task("planted", folder)
            truth = runpy.run_path(str(Path(task.folder) / "locked" / "evaluate.py"))
        yield PlantedBandit(task, truth, seed, self.num_ideas)


class PlantedBandit:
    """Ideas are real diffs of the `planted` codebase; `pull` scores them by the locked evaluator's own functions."""

    def __init__(self, task: Task, truth: Mapping[str, Any], seed: int, num_ideas: int):
        self._truth = truth
        base = task.baseline
        marked = [_set_constants(task, changes) for changes in (*SAFE, BEST)]
        floor = min(truth["true_loss"](_constants(task, read_change(idea.diff or "", base, task.policy)[0]))
                    for idea in marked[:2])  # fmt: skip
        others = _draw_ideas(
            task, MutationIdeas(), seed, num_ideas - len(marked), marked,
            lambda tree: truth["true_loss"](_constants(task, tree)) >= floor,
        )  # fmt: skip
        self.ideas: Sequence[Idea] = (*marked, *others)
        self.best: int | None = len(SAFE)
        self.baseline_value = 1.0 / truth["true_loss"](_constants(task, base))
        rng = np.random.default_rng(stable_seed("planted bandit", seed))
        self.chances_A = np.array(
            [SAFE_CHANCE] * len(SAFE) + [BEST_CHANCE] + rng.uniform(*OTHER_CHANCES, len(others)).tolist()
        )
        rest = (1.0 - SAFE_SHARE - BEST_SHARE) / len(others)
        self.start_probs_A = np.array(
            [SAFE_SHARE / len(SAFE)] * len(SAFE) + [BEST_SHARE] + [rest] * len(others)
        )
        self._settings = [
            _constants(task, read_change(idea.diff or "", base, task.policy)[0]) for idea in self.ideas
        ]
        self.true_losses_A = np.array([truth["true_loss"](settings) for settings in self._settings])
        self._pulled: dict[tuple[int, int], Result] = {}  # variants meet the same (idea, seed) again

    def pull(self, picks_P: np.ndarray, seeds: Sequence[int]) -> list[Result]:
        """The executor gets an idea right with its chance; then the loss is the truth plus the task's noise of that seed."""
        pulls = list(zip(picks_P.tolist(), seeds, strict=True))
        for pull in pulls:
            if pull not in self._pulled:
                self._pulled[pull] = self._carry_out(*pull)
        return [self._pulled[pull] for pull in pulls]

    def _carry_out(self, pick: int, seed: int) -> Result:
        if stable_seed("executor", seed, pick) >= self.chances_A[pick] * 2.0**63:
            return Result(status=Status.RUN_CRASH, seed=seed)
        true_loss = float(self.true_losses_A[pick])
        metric = true_loss + self._truth["noise"](self._settings[pick], str(seed))
        return Result(status=Status.OK, metric=metric, seed=seed, extra={"true_loss": true_loss})


def _constants(task: Task, tree: Mapping[str, bytes]) -> dict[str, float]:
    """The settings as the judge reads them from the artifact."""
    return {site.name: float(site.value) for site in find_sites(tree, task.policy)}


def _set_constants(task: Task, changes: Mapping[str, float]) -> Idea:
    sites = {site.name: site for site in find_sites(task.baseline, task.policy)}
    tree = replace_values(task.baseline, [(sites[name], repr(value)) for name, value in changes.items()])
    text = " ".join(f"Change {name} from {sites[name].value} to {value}." for name, value in changes.items())
    return Idea(text=text, diff=emit_diff(make_diff(task.baseline, tree)), operator="set")


# --- with a codebase that runs


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodebaseBanditConfig:
    """Mutations of a codebase, drawn once and run for real; at the start each is as likely as any other."""

    codebase: str
    resource: str = "1xCPU"
    num_ideas: int = 24
    ideas: MutationIdeas = MutationIdeas()
    sandbox: SandboxConfig = SandboxConfig()
    budget: Budget = Budget()

    def __post_init__(self) -> None:
        Resource.parse(self.resource)
        if self.num_ideas < 2:
            raise ConfigError(f"num_ideas must be at least 2, got {self.num_ideas}")

    @contextmanager
    def open(self, seed: int, workdir: Path) -> Iterator["CodebaseBandit"]:
        """A campaign's environment in `workdir`: what its ledger knows is not run again.

        Raises:
          ConfigError: the codebase is not one, offers fewer ideas, or does not run itself.
        """
        with AIResearchEnv(
            codebase=self.codebase, resource=self.resource, workdir=workdir, sandbox=self.sandbox,
            budget=self.budget, seed=seed,
        ) as env:  # fmt: skip
            yield CodebaseBandit(env, self.ideas, seed, self.num_ideas)


class CodebaseBandit:
    """A pull is `env.evaluate` of the idea's diff: equal trees under one seed are one run."""

    def __init__(self, env: AIResearchEnv, ideas: MutationIdeas, seed: int, num_ideas: int):
        self._env = env
        task = env.task
        if not find_sites(task.baseline, task.policy, ideas.frozen, ideas.focus):
            raise ConfigError(
                f"the editable files of {task.name} must hold constants for mutations to change, got none"
            )
        self.ideas: Sequence[Idea] = tuple(_draw_ideas(task, ideas, seed, num_ideas, [], lambda tree: True))
        self.best: int | None = None
        self.start_probs_A = np.full(num_ideas, 1.0 / num_ideas)
        baseline = env.value("")
        if baseline.metric is None:
            raise ConfigError(
                f"the codebase must run before it is changed, got {baseline.status.value}: {baseline.reason} "
                f"{baseline.log_tail[-500:]}"
            )
        self.baseline_value = float(rewards_of([baseline], "paper")[0])

    def pull(self, picks_P: np.ndarray, seeds: Sequence[int]) -> list[Result]:
        """Run the diffs, in parallel as leases allow."""
        candidates = {
            pick: self._env.add(
                self.ideas[pick].diff or "", idea=self.ideas[pick].text, operator=self.ideas[pick].operator,
                arm="rl", key=f"rl:{pick}",
            )
            for pick in set(picks_P.tolist())
        }  # fmt: skip
        return self._env.evaluate_pairs(
            [(candidates[pick], seed) for pick, seed in zip(picks_P.tolist(), seeds, strict=True)]
        )


def _draw_ideas(
    task: Task,
    config: MutationIdeas,
    seed: int,
    count: int,
    taken: Sequence[Idea],
    is_wanted: Callable[[Mapping[str, bytes]], bool],
) -> list[Idea]:
    """`count` mutations of the baseline that mean different things; diffs that fail on purpose differ by their text.

    Raises:
      ConfigError: the codebase has fewer.
    """
    ideator = config.build(seed)
    seen = {syntax_digest(task.baseline)}
    seen |= {syntax_digest(read_change(idea.diff or "", task.baseline, task.policy)[0]) for idea in taken}
    found: list[Idea] = []
    for number in range(count * _MAX_TRIES):
        if len(found) == count:
            break
        idea = ideator.propose(f"rl/{number}", task.baseline, task.policy, task.baseline, [])
        if idea.operator == "fault":
            found.append(idea)
            continue
        tree, _ = read_change(idea.diff or "", task.baseline, task.policy)
        meaning = syntax_digest(tree)
        if meaning not in seen and is_wanted(tree):
            seen.add(meaning)
            found.append(idea)
    if len(found) < count:
        raise ConfigError(
            f"num_ideas asks for {count} different mutations, {task.name} gave {len(found)}; ask for fewer"
        )
    return found
