"""A codebase as a task: any folder with a `run.sh` and a locked `eval.sh`, and a `task.toml` for what differs from habit.

The folder is split in three. *Private* files (eval.sh, locked/, final/, task.toml) exist for the judge alone. The rest is the tree
that a run sees; of it only the *editable* paths may be changed by a diff. `data/` is mounted read-only into the run.
"""

import dataclasses
import os
import runpy
import shutil
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pretrain.config import ConfigError
from research_env.diff import PathPolicy
from research_env.records import Limits, canonical_json, digest, tree_digest

PRIVATE = ("eval.sh", "locked/", "final/", "task.toml")
FINAL = "final/"  # data of the final split: a judge of the search does not have them
IGNORED = (".git", "__pycache__", ".pytest_cache", ".venv")
MAX_TREE_BYTES = 64 << 20
_BUILT_IN = Path(__file__).parent / "tasks"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """Everything that decides what a diff is worth, except the diff, the seed and the rung."""

    name: str
    folder: str
    description: str
    metric: str
    higher_is_better: bool
    metric_range: tuple[float, float]
    policy: PathPolicy
    artifact: tuple[str, ...]  # file names or globs under the run's output folder
    max_artifact_bytes: int
    num_servers: int  # candidate model processes that the judge may question
    hides: tuple[
        str, ...
    ]  # packages of Python's library that hold held-out text: runs and servers find them empty
    compile_cache: bool  # whether runs and servers read what the baseline compiled
    serve_module: str  # module of the tree with load(folder) -> function, run by each of them
    limits: Limits
    judge_limits: Limits
    min_delta: float  # smallest improvement worth the name, in units of the metric
    rungs: tuple[float, ...]  # fractions of the full budget, last is 1
    baseline: Mapping[str, bytes]
    private: Mapping[str, bytes]
    data: str  # folder on the host, or ""
    data_digest: str

    @property
    def digest(self) -> str:
        """Hash of all that a result depends on besides tree, seed and rung."""
        named = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in ("folder", "baseline", "private", "data", "policy", "limits", "judge_limits")
        }
        records = [dataclasses.asdict(item) for item in (self.policy, self.limits, self.judge_limits)]
        return digest(canonical_json([named, records]), tree_digest(self.baseline), tree_digest(self.private))

    @property
    def has_final(self) -> bool:
        """Whether the judge has a split that no search has seen."""
        return any(path.startswith(FINAL) for path in self.private)

    def better(self, left: float, right: float) -> bool:
        """Whether metric `left` beats `right`."""
        return left > right if self.higher_is_better else left < right


def built_in_tasks() -> list[str]:
    """Names that `codebase=` accepts besides folders."""
    return sorted(path.name for path in _BUILT_IN.iterdir() if (path / "codebase").is_dir())


def open_task(codebase: str, workdir: str | Path) -> Task:
    """The task of a folder, or of a built-in name, which is first laid out under `workdir`.

    Raises:
      ConfigError: no such codebase, or a fault in it; all faults of task.toml at once.
    """
    if codebase in built_in_tasks():
        return read_task(_lay_out(codebase, Path(workdir)))
    if not Path(codebase).is_dir():
        names = ", ".join(built_in_tasks())
        raise ConfigError(
            f"codebase must be a folder or one of {names}, got {codebase!r}; is the path right?"
        )
    return read_task(codebase)


def _lay_out(name: str, workdir: Path) -> Path:
    """Copy a built-in codebase and let its prepare.py add data: a pure function of the installed files."""
    source = _BUILT_IN / name
    target = workdir / "codebases" / name
    building = target.with_name(f".{name}-{os.getpid()}")
    shutil.rmtree(building, ignore_errors=True)
    building.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(source / "codebase", building, ignore=shutil.ignore_patterns(*IGNORED))
    if (source / "prepare.py").is_file():
        runpy.run_path(str(source / "prepare.py"))["prepare"](building)
    shutil.rmtree(target, ignore_errors=True)
    building.rename(target)
    return target


def read_task(folder: str | Path) -> Task:
    """Read a codebase folder.

    Raises:
      ConfigError: run.sh or eval.sh is missing, task.toml has unknown keys or wrong values, or the folder is too large.
    """
    folder = Path(folder)
    faults = [
        f"a codebase needs {name}; {folder} has none"
        for name in ("run.sh", "eval.sh")
        if not (folder / name).is_file()
    ]
    if faults:
        raise ConfigError(*faults)
    fields = _read_toml(folder)
    private_paths = (*PRIVATE, *fields.pop("private", []))
    data_folder = folder / fields.pop("data", "data")
    rule = PathPolicy(editable=(), locked=private_paths)
    fault = _data_fault(folder.resolve(), data_folder.resolve(), rule)
    if fault:
        raise ConfigError(f"{folder}/task.toml: {fault}")
    files = _read_files(folder, skip=data_folder)
    private = {path: data for path, data in files.items() if rule.is_locked(path)}
    baseline = {path: data for path, data in files.items() if path not in private}
    locked = (*private_paths, "run.sh", "data/", "out/", *fields.pop("locked", []))
    policy = PathPolicy(
        editable=tuple(fields.pop("editable", [""])), locked=locked, **fields.pop("policy", {})
    )
    low, high = fields.pop("metric_range", (-1e30, 1e30))
    try:
        return Task(
            name=fields.pop("name", folder.resolve().name),
            folder=str(folder),
            description=fields.pop("description", ""),
            metric=fields.pop("metric", "metric"),
            higher_is_better=fields.pop("higher_is_better", False),
            metric_range=(float(low), float(high)),
            policy=policy,
            artifact=tuple(fields.pop("artifact", ["*"])),
            max_artifact_bytes=int(fields.pop("artifact_mb", 64) * (1 << 20)),
            num_servers=fields.pop("servers", 0),
            hides=tuple(fields.pop("hides", [])),
            compile_cache=fields.pop("compile_cache", False),
            serve_module=fields.pop("serve_module", "model"),
            limits=_limits(fields.pop("limits", {}), 600.0),
            judge_limits=_limits(fields.pop("judge_limits", {}), 300.0),
            min_delta=float(fields.pop("min_delta", 0.0)),
            rungs=tuple(float(value) for value in fields.pop("rungs", [1.0])),
            baseline=baseline,
            private=private,
            data=str(data_folder) if data_folder.is_dir() else "",
            data_digest=_digest_folder(data_folder) if data_folder.is_dir() else "",
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{folder}/task.toml: {error}") from error


def _data_fault(folder: Path, data: Path, rule: PathPolicy) -> str:
    """Why a run may not have this data folder, which it sees whole; or nothing."""
    if folder.is_relative_to(data):
        return f"data must be a folder of its own, got {data}, which holds the judge's files"
    if not data.is_relative_to(folder):
        return ""
    name = data.relative_to(folder).as_posix()
    if rule.is_locked(name):
        return f"data must not lie among the judge's files, got {name}"
    held = [path for path in rule.locked if path.startswith(name + "/")]
    return f"data={name} is shown to runs, so it cannot hold the private {', '.join(held)}" if held else ""


_KEYS = {
    "name": str, "description": str, "metric": str, "higher_is_better": bool, "metric_range": list, "editable": list,
    "locked": list, "private": list, "artifact": list, "artifact_mb": (int, float), "servers": int, "serve_module": str, "hides": list,
    "compile_cache": bool, "min_delta": (int, float), "rungs": list, "data": str, "limits": dict, "judge_limits": dict, "policy": dict,
}  # fmt: skip
_LIMIT_KEYS = {"wall_s", "cpu_s", "memory_mb", "pids", "disk_mb", "output_kb"}
_POLICY_KEYS = {"suffixes", "max_diff_bytes", "max_files", "max_hunks", "max_line_bytes", "max_file_bytes"}


def _read_toml(folder: Path) -> dict[str, Any]:
    file = folder / "task.toml"
    if not file.is_file():
        return {}
    try:
        fields = tomllib.loads(file.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} must be TOML: {error}") from error
    faults = [
        f"{file}: unknown key {key!r}; known are {', '.join(sorted(_KEYS))}"
        for key in fields
        if key not in _KEYS
    ]
    for key, kind in _KEYS.items():
        if key in fields and (
            not isinstance(fields[key], kind) or (kind is not bool and isinstance(fields[key], bool))
        ):
            faults.append(
                f"{file}: {key} must be of type {getattr(kind, '__name__', 'number')}, got {fields[key]!r}"
            )
    for key, known in (("limits", _LIMIT_KEYS), ("judge_limits", _LIMIT_KEYS), ("policy", _POLICY_KEYS)):
        table = fields.get(key, {})
        if isinstance(table, dict):
            unknown = sorted(set(table) - known)
            faults += [
                f"{file}: unknown key {key}.{name}; known are {', '.join(sorted(known))}" for name in unknown
            ]
    if "metric_range" in fields and (
        len(fields["metric_range"]) != 2 or not fields["metric_range"][0] < fields["metric_range"][1]
    ):
        faults.append(
            f"{file}: metric_range must be [low, high] with low < high, got {fields['metric_range']}"
        )
    rungs = fields.get("rungs", [1.0])
    if not rungs or rungs != sorted(rungs) or not rungs[0] > 0 or rungs[-1] != 1:
        faults.append(f"{file}: rungs must rise, lie in (0, 1] and end with 1.0, got {rungs}")
    if faults:
        raise ConfigError(*faults)
    if "suffixes" in fields.get("policy", {}):
        fields["policy"]["suffixes"] = tuple(fields["policy"]["suffixes"])
    return fields


def _limits(table: Mapping[str, Any], wall_s: float) -> Limits:
    return Limits(
        wall_s=float(table.get("wall_s", wall_s)),
        cpu_s=float(table["cpu_s"]) if "cpu_s" in table else None,
        memory_bytes=int(table.get("memory_mb", 2048)) << 20,
        pids=int(table.get("pids", 128)),
        disk_bytes=int(table.get("disk_mb", 256)) << 20,
        output_bytes=int(table.get("output_kb", 4096)) << 10,
    )


def _read_files(folder: Path, skip: Path) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    total = 0
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(f for f in folders if f not in IGNORED and Path(parent, f) != skip)
        for name in sorted(names):
            path = Path(parent, name)
            if path.is_symlink():
                raise ConfigError(
                    f"{path} is a link; a codebase holds plain files, so that what is hashed is what runs"
                )
            total += path.stat().st_size
            if total > MAX_TREE_BYTES:
                raise ConfigError(
                    f"{folder} holds more than {MAX_TREE_BYTES >> 20} MiB besides data/; move data to data/"
                )
            files[path.relative_to(folder).as_posix()] = path.read_bytes()
    return files


def _digest_folder(folder: Path) -> str:
    parts: list[str | bytes] = []
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            parts += [path.relative_to(folder).as_posix(), path.read_bytes()]
    return digest(*parts)
