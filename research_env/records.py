"""The nouns of the environment: what a candidate is, what it may use, and what came of it.

Every record is a frozen dataclass that goes to JSON and back without loss, because records cross process and
machine borders as files and rows.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from enum import StrEnum
from typing import Any, Self

from pretrain.config import ConfigError


class Status(StrEnum):
    """How one evaluation of one diff ended. Every program gets exactly one."""

    OK = "ok"
    PATCH_REJECTED = "patch_rejected"  # the path policy, or text that is not a diff
    PATCH_FAILED = "patch_failed"  # a diff, but it does not apply
    BUILD_FAILED = "build_failed"
    RUN_CRASH = "run_crash"
    NO_ARTIFACT = "no_artifact"
    OOM_DEVICE = "oom_device"
    RUN_TIMEOUT = "run_timeout"
    OOM_HOST = "oom_host"
    DISK_LIMIT = "disk_limit"
    PIDS_LIMIT = "pids_limit"
    OUTPUT_LIMIT = "output_limit"
    EVAL_CRASH = "eval_crash"
    EVAL_TIMEOUT = "eval_timeout"
    METRIC_INVALID = "metric_invalid"
    EARLY_KILLED = "early_killed"
    PREEMPTED = "preempted"
    INFRA_ERROR = "infra_error"

    @property
    def is_sample(self) -> bool:
        """Whether search and RL may learn from it: the host's own faults teach nothing about the idea."""
        return self not in (Status.PREEMPTED, Status.INFRA_ERROR)

    @property
    def is_failure(self) -> bool:
        """Whether the idea itself failed (an early kill is ranked, not failed)."""
        return self.is_sample and self not in (Status.OK, Status.EARLY_KILLED)

    @property
    def is_repairable(self) -> bool:
        """Whether the executor may try again with the log in hand."""
        return self in (
            Status.PATCH_REJECTED,
            Status.PATCH_FAILED,
            Status.BUILD_FAILED,
            Status.RUN_CRASH,
            Status.NO_ARTIFACT,
            Status.OOM_DEVICE,
        )

    @property
    def shows_log(self) -> bool:
        """Whether the ideator may read the log tail. From the judge it sees the status only."""
        return self in (
            Status.OK,
            Status.BUILD_FAILED,
            Status.RUN_CRASH,
            Status.NO_ARTIFACT,
            Status.OOM_DEVICE,
            Status.EARLY_KILLED,
        )


class Record:
    """JSON both ways for the frozen dataclasses below (one level of nesting, enums by value)."""

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        """The record of `to_json`; unknown keys raise TypeError."""
        return cls(**fields)


@dataclasses.dataclass(frozen=True)
class Resource(Record):
    """What one run leases: `Resource.parse("8xH100")` is 8 devices of kind H100."""

    count: int
    kind: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `<count>x<kind>`.

        Raises:
          ConfigError: another form.
        """
        match = re.fullmatch(r"([1-9][0-9]{0,4})x([A-Za-z][A-Za-z0-9_-]{0,31})", text)
        if match is None:
            raise ConfigError(f"resource must look like '1xCPU' or '8xH100' (count x kind), got {text!r}")
        return cls(int(match[1]), match[2])

    def __str__(self) -> str:
        return f"{self.count}x{self.kind}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits(Record):
    """What a job may use before it is stopped, and the status names which of these it met."""

    wall_s: float = 60.0
    cpu_s: float | None = None  # the compute budget: what a run may use of all its cores together
    memory_bytes: int = 2 << 30
    pids: int = 128
    disk_bytes: int = 256 << 20
    output_bytes: int = 4 << 20

    def __post_init__(self) -> None:
        faults = [
            f"limits.{field.name} must be positive, got {getattr(self, field.name)}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) is not None and not getattr(self, field.name) > 0
        ]
        if faults:
            raise ConfigError(*faults)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Idea(Record):
    """A proposal in words, with the diff when the ideator could already write it."""

    text: str
    diff: str | None = None
    operator: str = ""  # mutation operator or model that wrote it
    parents: tuple[str, ...] = ()  # node ids
    base: str = ""  # node id whose tree the diff is against; "" is the baseline
    key: str = ""  # slot in the campaign: makes a replay find the same idea

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        return cls(**{**fields, "parents": tuple(fields.get("parents", ()))})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result(Record):
    """What `value` returns: a status, a metric when the status is OK, and what it cost."""

    status: Status
    reason: str = ""
    metric: float | None = None
    higher_is_better: bool = False
    wall_s: float = 0.0  # of the run itself
    judge_s: float = 0.0
    device_s: float = 0.0  # run seconds x devices leased
    cpu_s: float = 0.0
    peak_memory_bytes: int = 0
    peak_device_memory_bytes: int = 0
    seed: int = 0
    rung: float | None = None  # share of the full budget
    isolation: str = ""  # level of the jail, with what it lacks
    cache_hit: bool = False
    log_tail: str = ""
    curve: tuple[tuple[float, float], ...] = ()  # (step, loss) the run streamed: advice, never a score
    extra: Mapping[str, float] = dataclasses.field(default_factory=dict)  # further numbers of the judge
    artifact_digest: str = ""
    tree_digest: str = ""
    env_digest: str = ""
    diff_digest: str = ""
    run_key: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "status", Status(self.status))
        object.__setattr__(self, "curve", tuple((float(a), float(b)) for a, b in self.curve))
        assert (self.status is Status.OK) == (self.metric is not None), "a metric exists exactly for OK"

    def better_than(self, other: "Result | float | None") -> bool:
        """Whether this metric beats the other's in the task's direction; a failure beats nothing."""
        mark = other.metric if isinstance(other, Result) else other
        if self.metric is None:
            return False
        return mark is None or (self.metric > mark if self.higher_is_better else self.metric < mark)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Node(Record):
    """One point of the lineage: a canonical diff against the baseline, and where it came from."""

    id: str
    parents: tuple[str, ...] = ()
    tree_digest: str = ""
    diff: str = ""  # canonical, against the baseline
    idea: str = ""
    operator: str = ""
    arm: str = ""  # search method that asked for it
    key: str = ""  # slot in the campaign
    epoch: int = 0
    prompt_hash: str = ""
    tokens: int = 0
    cost_usd: float = 0.0

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        return cls(**{**fields, "parents": tuple(fields.get("parents", ()))})


def digest(*parts: str | bytes) -> str:
    """sha256 over length-prefixed parts, so that no two lists of parts collide by concatenation."""
    total = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogateescape") if isinstance(part, str) else part
        total.update(len(data).to_bytes(8, "little"))
        total.update(data)
    return total.hexdigest()


def tree_digest(tree: Mapping[str, bytes]) -> str:
    """One hash over the paths and bytes of a tree."""
    return digest(*(part for path in sorted(tree) for part in (path, tree[path])))


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
