"""A campaign: search arms over one environment, then paired confirmation of what screened well.

Everything expensive (runs, model calls) is memoized in the ledger under keys that derive from the campaign's seed, and
everything else is a deterministic program. Resuming a killed campaign is therefore running it again.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence

from pretrain.config import stable_seed
from research_env.choose import (
    Noise,
    Verdict,
    confirm,
    estimate_prior_sigma,
    gain,
    luck_of_best,
    passes_screen,
    posterior_mean,
)
from research_env.env import AIResearchEnv, Candidate
from research_env.novelty import syntax_digest
from research_env.records import Result, Status
from research_env.schedule import CannotGoOn, OutOfBudget
from research_env.search.makers import Maker
from research_env.search.proposal import Proposal, Search, Told
from research_env.search.rungs import COSTS, Rungs

MAX_TRIES = 8  # ideas that repeat an earlier one of the arm are asked for again, with another key


@dataclasses.dataclass(frozen=True)
class Confirmed:
    """A candidate that was run on fresh seeds beside the baseline."""

    candidate: Candidate
    verdict: Verdict
    posterior: float


@dataclasses.dataclass(frozen=True)
class ArmResult:
    """What one arm did."""

    arm: str
    told: tuple[Told, ...]
    confirmed: tuple[Confirmed, ...]
    num_duplicates: int
    stopped: str = ""  # why it ended early

    @property
    def num_executed(self) -> int:
        """Candidates whose code ran (a refused diff does not count)."""
        return sum(
            item.result.status not in (Status.PATCH_FAILED, Status.PATCH_REJECTED) for item in self.told
        )

    @property
    def best(self) -> Told | None:
        """The best screened candidate."""
        good = [item for item in self.told if item.gain is not None]
        return max(good, key=lambda item: item.gain or 0.0, default=None)

    @property
    def winner(self) -> Confirmed | None:
        """The promoted candidate with the largest posterior mean."""
        promoted = [item for item in self.confirmed if item.verdict.decision == "promote"]
        return max(promoted, key=lambda item: item.posterior, default=None)

    def corrected_best(self, noise: Noise) -> float:
        """The best screened gain less the luck of the best of so many."""
        num_ok = sum(item.gain is not None for item in self.told)
        return 0.0 if self.best is None else (self.best.gain or 0.0) - luck_of_best(num_ok) * noise.sigma


def measure_noise(env: AIResearchEnv, num_repeats: int) -> tuple[Noise, float]:
    """sigma0 and the mean from repeats of the baseline on fresh seeds.

    Raises:
      CannotGoOn: the baseline itself fails; says how.
    """
    baseline = env.add("", key="baseline")
    seeds = [stable_seed(env.seed, "noise", i) for i in range(num_repeats)]
    results = env.evaluate_pairs([(baseline, seed) for seed in [env.screen_seed, *seeds]], purpose="baseline")
    for result in results:
        if result.metric is None:
            raise CannotGoOn(
                f"the baseline ended with {result.status.value}: {result.reason}\n{result.log_tail[-1500:]}"
            )
    metrics = [result.metric for result in results if result.metric is not None]
    noise = Noise.of(metrics)
    return noise, sum(metrics) / len(metrics)


def run_arm(
    env: AIResearchEnv,
    search: Search,
    maker: Maker,
    *,
    num_candidates: int,
    batch: int,
    noise: Noise,
    baseline_mean: float,
    on_told: Callable[[Told], None] = lambda told: None,
    is_enough: Callable[[Sequence[Told]], bool] = lambda told: False,
    rungs: Rungs | None = None,
) -> ArmResult:
    """Ask, make, run, tell, until `num_candidates` are told, `is_enough` of all that was told, or the budget ends.

    With `rungs` candidates climb by successive halving; else each runs at full length.
    """
    evaluate = env.evaluate if rungs is None else rungs.evaluate
    told: list[Told] = []
    seen = {syntax_digest(env.task.baseline)}
    num_duplicates, stopped = 0, ""
    while len(told) < num_candidates and not stopped and not is_enough(told):
        proposals = search.ask(min(batch, num_candidates - len(told)))
        fresh: list[tuple[Proposal, Candidate]] = []
        try:
            for proposal in proposals:
                candidate, num_repeats = _make_new(maker, proposal, seen)
                num_duplicates += num_repeats
                fresh.append((proposal, candidate))
            results = evaluate([candidate for _, candidate in fresh], purpose="screen")
            fresh, results = _repair(evaluate, maker, fresh, results)
        except OutOfBudget as error:
            stopped = str(error)
            break
        news = []
        for (proposal, candidate), result in zip(fresh, results, strict=True):
            if not result.status.is_sample:
                continue
            better_by = (
                None
                if result.metric is None
                else gain(result.metric, baseline_mean, env.task.higher_is_better)
            )
            item = Told(proposal, candidate.node, result, better_by)
            news.append(item)
            if (search.name, candidate.node.id) not in _told_nodes(env):
                # What all rungs cost is not in the row of the last one.
                detail = {"node": candidate.node.id, "run": result.run_key, "device_s": result.device_s}
                env.ledger.note("told", search.name, json.dumps(detail))
            on_told(item)
        search.tell(news)
        maker.tell(news)
        told += news
        if not news:
            stopped = "the host failed on a whole batch"
    return ArmResult(search.name, tuple(told), (), num_duplicates, stopped)


def _make_new(maker: Maker, proposal: Proposal, seen: set[str]) -> tuple[Candidate, int]:
    """A candidate whose code means something new, or the last of MAX_TRIES; adds its meaning to `seen`, counts repeats."""
    num_repeats = 0
    while True:
        key = proposal.key if num_repeats == 0 else f"{proposal.key}~{num_repeats}"
        candidate = maker.make(proposal, key)
        if candidate.tree is None:
            return candidate, num_repeats
        meaning = syntax_digest(candidate.tree)
        if meaning not in seen:
            seen.add(meaning)
            return candidate, num_repeats
        num_repeats += 1
        if num_repeats == MAX_TRIES:
            return candidate, num_repeats


def _repair(
    evaluate: Callable[..., list[Result]],
    maker: Maker,
    fresh: list[tuple[Proposal, Candidate]],
    results: list[Result],
) -> tuple[list[tuple[Proposal, Candidate]], list[Result]]:
    """Failures get another try each while the maker has one; a repaired candidate takes its parent's place and its costs."""
    fresh, results = list(fresh), list(results)
    turn = 0
    while True:
        repaired = {}
        for index, ((proposal, candidate), result) in enumerate(zip(fresh, results, strict=True)):
            child = maker.repair(proposal, candidate, result, turn)
            if child is not None:
                repaired[index] = child
        if not repaired:
            return fresh, results
        found = evaluate(list(repaired.values()), purpose="repair")
        for (index, child), result in zip(repaired.items(), found, strict=True):
            fresh[index] = (fresh[index][0], child)
            results[index] = with_costs_of(result, results[index])
        turn += 1


def with_costs_of(result: Result, earlier: Result) -> Result:
    """`result` with the seconds of both runs: what a candidate cost is all that was run for it."""
    return dataclasses.replace(
        result, **{name: getattr(result, name) + getattr(earlier, name) for name in COSTS}
    )


def _told_nodes(env: AIResearchEnv) -> set[tuple[str, str]]:
    return {(arm, json.loads(detail)["node"]) for arm, detail in env.ledger.events("told")}


def confirm_best(
    env: AIResearchEnv, result: ArmResult, *, noise: Noise, baseline_mean: float, max_confirmed: int
) -> ArmResult:
    """Confirm the most promising candidates on fresh seeds, paired with the baseline on the same ones."""
    gains = [item.gain for item in result.told if item.gain is not None]
    prior = estimate_prior_sigma(gains, noise)
    promising = sorted(
        (t for t in result.told if t.gain is not None and passes_screen(t.gain, noise)),
        key=lambda t: -(t.gain or 0.0),
    )
    baseline = env.add("", key="baseline")
    confirmed = []
    stopped = result.stopped
    for item in promising[:max_confirmed]:
        candidate = Candidate(item.node, env.tree_of(item.node), None)

        def run_pairs(first: int, last: int, candidate: Candidate = candidate) -> Sequence[float]:
            return paired_gains(env, candidate, baseline, range(first, last))

        try:
            verdict = confirm(run_pairs, noise, env.task.min_delta)
        except OutOfBudget as error:
            stopped = str(error)
            break
        posterior = posterior_mean(verdict.mean, verdict.num_seeds, noise, prior)
        env.ledger.note(
            "verdict",
            item.node.id,
            json.dumps({"arm": result.arm, "posterior": posterior, **dataclasses.asdict(verdict)}),
        )
        confirmed.append(Confirmed(candidate, verdict, posterior))
    return dataclasses.replace(result, confirmed=tuple(confirmed), stopped=stopped)


def paired_gains(
    env: AIResearchEnv, candidate: Candidate, baseline: Candidate, numbers: Sequence[int]
) -> list[float]:
    """Gains over the baseline on the campaign's confirming seeds; a seed on which the candidate fails has the range's worst metric.

    Raises:
      CannotGoOn: the baseline or the host failed, so that the pair says nothing of the candidate.
    """
    seeds = [stable_seed(env.seed, "confirm", number) for number in numbers]
    results = env.evaluate_pairs(
        [(c, seed) for seed in seeds for c in (candidate, baseline)], purpose="confirm"
    )
    low, high = env.task.metric_range
    worst = low if env.task.higher_is_better else high
    gains = []
    for mine, base in zip(results[::2], results[1::2], strict=True):
        if base.metric is None:
            raise CannotGoOn(f"the baseline failed on a confirming seed: {base.status.value} {base.reason}")
        if not mine.status.is_sample:
            raise CannotGoOn(f"the host failed on a confirming seed: {mine.status.value} {mine.reason}")
        gains.append(
            gain(worst if mine.metric is None else mine.metric, base.metric, env.task.higher_is_better)
        )
    return gains


def best_so_far(results: Sequence[Result]) -> list[float | None]:
    """The running best metric."""
    best: Result | None = None
    curve: list[float | None] = []
    for result in results:
        if result.better_than(best):
            best = result
        curve.append(None if best is None else best.metric)
    return curve
