"""AIResearchEnv: a code diff goes in, a result comes out. The only place where the parts meet.

    env = AIResearchEnv(codebase="toy", resource="1xCPU")
    env.value(diff).metric

The class is that of dissertation arXiv 2603.18073, part 3 (codebase, resource, value). Ours returns a Result instead of a
bare number, never raises for a bad program, and runs each resulting tree once.
"""

import dataclasses
import os
import platform
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path

from pretrain.config import ConfigError, stable_seed
from pretrain.jobs.api import JobsConfig
from research_env.diff import DiffFailed, DiffRefused, make_diff, read_change
from research_env.diff import emit_diff as _emit_diff
from research_env.ledger import Ledger, ledger_path
from research_env.records import Node, Resource, Result, Status, digest, tree_digest
from research_env.sandbox import cgroup
from research_env.sandbox.jail import WITH_MOUNTS
from research_env.sandbox.ladder import Isolation, SandboxConfig, choose_level
from research_env.sandbox.run import remove_scratch, scratch_root
from research_env.schedule import PRIORITIES, Budget, Devices, run_all, run_all_on
from research_env.task import FINAL, Task, open_task
from research_env.worker import JobSpec, campaign_prefix, job_name, run_job, sealed_folder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
    """What an ideator may know: the code, what may change, how good it is, and what came of earlier ideas."""

    task: Task
    baseline: Result
    best: Result
    best_node: Node | None
    history: tuple[tuple[Node, Result], ...]  # screened candidates in the order they finished

    @property
    def tree(self) -> Mapping[str, bytes]:
        """The baseline's files."""
        return self.task.baseline


class AIResearchEnv:
    """One campaign on one codebase: its folder holds the ledger, sealed artifacts and the page."""

    def __init__(
        self,
        *,
        codebase: str,
        resource: str = "1xCPU",
        workdir: str | Path = "",
        sandbox: SandboxConfig | Isolation | None = None,
        budget: Budget | None = None,
        seed: int = 0,
        devices: Devices | None = None,
        jobs: JobsConfig | None = None,
    ):
        """`jobs` runs candidates on other processes or machines; None is this host, with leases of `devices`."""
        self.workdir = Path(workdir) if workdir else Path("runs") / "research" / Path(codebase).name
        self.resource = Resource.parse(resource)
        self.devices = devices or Devices.of_this_host()
        self.jobs = None if jobs is None else jobs.build(self.workdir / "jobs")
        if self.jobs is None:
            self.devices.check(self.resource)
        self.budget = budget or Budget()
        self.seed = seed
        self.ledger = Ledger(ledger_path(self.workdir))
        try:
            self.task = open_task(codebase, self.workdir)
            self.isolation = (
                sandbox if isinstance(sandbox, Isolation) else choose_level(sandbox or SandboxConfig())
            )
            self.num_swept = self._sweep()
        except BaseException:
            self.ledger.close()
            raise
        self.label = self.isolation.label
        if self.task.hides and self.isolation.level not in WITH_MOUNTS:
            self.label += f" (shows {', '.join(self.task.hides)})"
        self.env_digest = digest(self.task.digest, self.isolation.level, _interpreter())
        self.cache = self.workdir / "caches" / self.env_digest[:32] if self.task.compile_cache else None
        self._is_filling_cache = False
        self.screen_seed = stable_seed(self.seed, "screen")
        self._trees: dict[str, Mapping[str, bytes]] = {tree_digest(self.task.baseline): self.task.baseline}
        self.on_result: Callable[[Node, str, Result], None] = lambda node, purpose, result: None

    def close(self) -> None:
        """Let the campaign's folder go."""
        self.ledger.close()

    def __enter__(self) -> "AIResearchEnv":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- the thesis' interface

    def value(self, code_diff: str, *, seed: int | None = None, rung: float | None = None) -> Result:
        """What a diff against the baseline is worth; "" is the baseline itself.

        `rung` is the share of the full budget, in (0, 1]; None is all of it.

        Raises:
          OutOfBudget: before anything is spent.
          ValueError: `rung` is no such share.
        """
        return self.value_many([code_diff], seed=seed, rung=rung)[0]

    def value_many(
        self, diffs: Sequence[str], *, seed: int | None = None, rung: float | None = None
    ) -> list[Result]:
        """`value` of several diffs, in parallel as leases allow; equal trees run once."""
        nodes = [self.add(text) for text in diffs]
        return self.evaluate(nodes, seed=seed, rung=rung)

    def context(self) -> Context:
        """The baseline, what may change, the best so far and the history; runs the baseline when it has not run."""
        baseline = self.value("")
        history = []
        best, best_node = baseline, None
        baseline_digest = tree_digest(self.task.baseline)
        for node_id, purpose, result in self.ledger.results():
            node = self.ledger.node(node_id)
            if purpose != "screen" or node.tree_digest == baseline_digest:
                continue
            if result.metric is not None and result.rung != self.task.rungs[-1]:
                continue  # the metric of a short run is none to compare
            history.append((node, result))
            if result.better_than(best):
                best, best_node = result, node
        return Context(
            task=self.task, baseline=baseline, best=best, best_node=best_node, history=tuple(history)
        )

    # --- nodes

    def add(
        self,
        text: str,
        *,
        base: str = "",
        idea: str = "",
        operator: str = "",
        parents: Sequence[str] = (),
        arm: str = "",
        key: str = "",
        epoch: int = 0,
        tokens: int = 0,
        cost_usd: float = 0.0,
    ) -> "Candidate":
        """Read a diff against node `base` (the baseline when empty) into a candidate, good or refused."""
        base_tree = self.tree_of(self.ledger.node(base)) if base else self.task.baseline
        common = {
            "idea": idea,
            "operator": operator,
            "parents": tuple(parents),
            "arm": arm,
            "key": key,
            "epoch": epoch,
            "tokens": tokens,
            "cost_usd": cost_usd,
        }
        try:
            tree, _ = read_change(text, base_tree, self.task.policy)
        except (DiffRefused, DiffFailed) as error:
            status = Status.PATCH_REJECTED if isinstance(error, DiffRefused) else Status.PATCH_FAILED
            tag = digest("refused", text, base, key)
            node = self.ledger.add_node(Node(id=tag[:16], diff=text[:20_000], **common))
            return Candidate(
                node, None, Result(status=status, reason=str(error)[:2000], diff_digest=digest(text))
            )
        found = tree_digest(tree)
        self._trees[found] = tree
        canonical = _emit_diff(make_diff(self.task.baseline, tree))
        tag = digest("node", found, key)
        node = self.ledger.add_node(Node(id=tag[:16], tree_digest=found, diff=canonical, **common))
        return Candidate(node, tree, None)

    def tree_of(self, node: Node) -> Mapping[str, bytes]:
        """The files of a node."""
        if node.tree_digest not in self._trees:
            tree, _ = read_change(node.diff, self.task.baseline, self.task.policy)
            assert tree_digest(tree) == node.tree_digest, (
                f"node {node.id} no longer gives its tree: the baseline changed"
            )
            self._trees[node.tree_digest] = tree
        return self._trees[node.tree_digest]

    # --- running

    def run_key(self, tree: str, seed: int, rung: float, split: str = "search") -> str:
        """Hash of everything that decides a result."""
        parts = ("run", self.env_digest, tree, str(seed), repr(rung), str(self.resource))
        return digest(*parts, *(() if split == "search" else (split,)))[:32]

    def evaluate(
        self,
        candidates: Sequence["Candidate"],
        *,
        seed: int | None = None,
        rung: float | None = None,
        purpose: str = "screen",
    ) -> list[Result]:
        """Results in order. What the ledger has is not run again.

        Raises:
          OutOfBudget: before anything new is spent.
        """
        return self.evaluate_pairs(
            [(candidate, seed) for candidate in candidates], rung=rung, purpose=purpose
        )

    def evaluate_pairs(
        self,
        pairs: Sequence[tuple["Candidate", int | None]],
        *,
        rung: float | None = None,
        purpose: str = "screen",
        split: str = "search",
    ) -> list[Result]:
        """`evaluate`, each candidate with its own seed (None is the campaign's screening seed).

        Raises:
          OutOfBudget: before anything new is spent.
          ConfigError: `split` is final, and it was opened for another tree than one of these.
        """
        rung = self.task.rungs[-1] if rung is None else rung
        if not 0.0 < rung <= 1.0:
            raise ValueError(f"rung must be a share of the full budget in (0, 1], got {rung}")
        if split == "final":
            self._open_final([candidate for candidate, _ in pairs])
        self._fill_cache()
        keys: list[str] = []
        pending: dict[str, tuple[Candidate, int]] = {}
        cached: set[str] = set()
        for candidate, asked in pairs:
            seed = self.screen_seed if asked is None else asked
            if candidate.tree is None:
                keys.append(self._record_refusal(candidate, seed, rung, purpose))
                continue
            key = self.run_key(candidate.node.tree_digest, seed, rung, split)
            if self.ledger.result(key) is not None:
                cached.add(key)
            elif key not in pending:
                pending[key] = (candidate, seed)
            keys.append(key)
        # Rows that are there were admitted when they were written: a restart decides as the first run did.
        states = self.ledger.states()
        num_new = sum(key not in states for key in pending)
        if num_new:
            self.budget.check(self.ledger.spent(), num_new)
        for key, (candidate, seed) in pending.items():
            node = candidate.node
            is_baseline = node.tree_digest == tree_digest(self.task.baseline)
            self.ledger.enqueue(
                key, node=node.id, purpose="baseline" if is_baseline and split == "search" else purpose, tree=node.tree_digest,
                seed=seed, rung=rung, resource=str(self.resource),
            )  # fmt: skip

        def run_one(key: str, leased: tuple[int, ...]) -> Result:
            candidate, seed = pending[key]
            return self._run(key, candidate, seed, rung, leased, split)

        def on_done(key: str, result: Result) -> None:
            shutil.rmtree(sealed_folder(self.workdir, key), ignore_errors=True)
            sealed_folder(self.workdir, key).with_suffix(".json").unlink(missing_ok=True)
            self.on_result(pending[key][0].node, purpose, result)

        queue = [
            (key, PRIORITIES["baseline" if not pending[key][0].node.diff else purpose]) for key in pending
        ]
        if self.jobs is None:
            run_all(queue, run_one, self.ledger, self.devices, self.resource, on_done)
        else:

            def make_spec(key: str) -> JobSpec:
                return self._spec(key, *pending[key], rung, (), split)

            run_all_on(self.jobs, queue, make_spec, self.ledger, self.resource, self.task, on_done)
        results = []
        seen: set[str] = set()
        for key in keys:
            result = self.ledger.result(key)
            assert result is not None, f"run {key} ended without a result"
            results.append(dataclasses.replace(result, cache_hit=key in cached or key in seen))
            seen.add(key)
        return results

    def final_score(self, node: Node, *, num_seeds: int = 3) -> list[tuple[Result, Result]]:
        """(baseline, node) on the final split, on the same fresh seeds. One node a campaign: whoever may ask again selects by it.

        Raises:
          ConfigError: the task has no final split, or another node has had it.
          OutOfBudget: before anything new is spent.
        """
        pair = (self.add("", key="baseline"), Candidate(node, self.tree_of(node), None))
        seeds = [stable_seed(self.seed, "final", number) for number in range(num_seeds)]
        results = self.evaluate_pairs(
            [(candidate, seed) for seed in seeds for candidate in pair], purpose="final", split="final"
        )
        return list(zip(results[::2], results[1::2], strict=True))

    def _open_final(self, candidates: Sequence["Candidate"]) -> None:
        """The first tree besides the baseline's that asks for the final split has it for the whole campaign."""
        if not self.task.has_final:
            raise ConfigError(
                f"{self.task.name} has no final split; put its data into {FINAL} of the codebase"
            )
        baseline = tree_digest(self.task.baseline)
        for candidate in candidates:
            tree = candidate.node.tree_digest
            if candidate.tree is None or tree == baseline:
                continue
            chosen = self.ledger.pin("final", tree)
            if chosen != tree:
                raise ConfigError(
                    f"the final split was opened for tree {chosen[:12]} and scores no other; begin a new campaign"
                )

    def _fill_cache(self) -> None:
        """Run the baseline alone first, where a compile cache is wanted and absent: its compiles become the cache."""
        if self.cache is None or self.cache.is_dir() or self._is_filling_cache:
            return
        if self.ledger.result(
            self.run_key(tree_digest(self.task.baseline), self.screen_seed, self.task.rungs[-1])
        ):
            return
        self._is_filling_cache = True
        try:
            self.evaluate([self.add("", key="baseline")], purpose="baseline")
        finally:
            self._is_filling_cache = False

    def _record_refusal(self, candidate: "Candidate", seed: int, rung: float, purpose: str) -> str:
        assert candidate.refusal is not None
        key = digest("refusal", self.env_digest, candidate.node.id)[:32]
        state = self.ledger.enqueue(
            key,
            node=candidate.node.id,
            purpose=purpose,
            tree="",
            seed=seed,
            rung=rung,
            resource=str(self.resource),
        )
        if state != "DONE":
            result = dataclasses.replace(
                candidate.refusal, seed=seed, rung=rung, run_key=key, env_digest=self.env_digest,
                isolation=self.label, higher_is_better=self.task.higher_is_better,
            )  # fmt: skip
            self.ledger.finish(key, result)
            self.on_result(candidate.node, purpose, result)
        return key

    def _run(
        self, key: str, candidate: "Candidate", seed: int, rung: float, leased: tuple[int, ...], split: str
    ) -> Result:
        spec = self._spec(key, candidate, seed, rung, leased, split)
        is_sealed = self.ledger.states()[key] == "SEALED"
        try:
            return run_job(
                spec, self.task, on_sealed=None if is_sealed else lambda found: self.ledger.seal(key, found)
            )
        except (OSError, TimeoutError) as error:
            return Result(
                status=Status.INFRA_ERROR, reason=f"{type(error).__name__}: {error}", seed=seed, rung=rung, run_key=key,
                isolation=self.label, higher_is_better=self.task.higher_is_better,
            )  # fmt: skip

    def _spec(
        self, key: str, candidate: "Candidate", seed: int, rung: float, leased: tuple[int, ...], split: str
    ) -> JobSpec:
        assert candidate.tree is not None
        return JobSpec(
            run_key=key,
            name=job_name(self.workdir, key),
            task_folder=os.path.abspath(self.task.folder),
            task_digest=self.task.digest,
            tree=candidate.tree,
            env_digest=self.env_digest,
            diff_digest=digest(candidate.node.diff),
            seed=seed,
            rung=rung,
            level=self.isolation.level,
            label=self.label,
            workdir=os.path.abspath(self.workdir),
            split=split,
            cpus=leased if self.resource.kind == "CPU" else (),
            num_devices=self.resource.count,
            devices=() if self.resource.kind == "CPU" else leased,
            device_kind=self.resource.kind,
            cache=os.path.abspath(self.cache)
            if self.cache and (self.cache.is_dir() or self._is_filling_cache)
            else "",
            fills_cache=self._is_filling_cache,
        )

    def _sweep(self) -> int:
        """Kill and remove what a killed supervisor of this campaign left on the host."""
        prefix = campaign_prefix(self.workdir)
        count = cgroup.sweep(self.isolation.hierarchies, prefix)
        for folder in scratch_root().glob(prefix + "*"):
            remove_scratch(folder)
            count += 1
        return count


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A node with its files, or with the reason why it has none."""

    node: Node
    tree: Mapping[str, bytes] | None
    refusal: Result | None


def _interpreter() -> str:
    """What else a number depends on: the interpreter and the packages that candidates compute with."""
    versions = []
    for name in ("numpy", "jax", "jaxlib", "flax", "optax"):
        try:
            versions.append(f"{name}={metadata.version(name)}")
        except metadata.PackageNotFoundError:
            versions.append(f"{name}=absent")
    return " ".join([platform.python_version(), platform.machine(), sys.platform, *versions])
