"""Where does the bootstrap help and where not? The same experiment with one thing varied at a time, in one table."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pretrain.config import ConfigError
from pretrain.rundir import write_atomic, write_json_atomic
from synth.sbp.pipeline import SbpConfig
from synth.sbp.table import ARMS
from synth.stage import RunConfig, StageResult


@dataclass(frozen=True, kw_only=True)
class Case:
    """One experiment of the sweep: what is varied, to which value, and the whole config with it."""

    varied: str
    value: str
    config: SbpConfig

    @property
    def name(self) -> str:
        """Names its folder."""
        return f"{self.varied}-{self.value}".replace(" ", "_")


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Cases, each run below the workdir of `run`."""

    cases: tuple[Case, ...]
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self):
        names = [case.name for case in self.cases]
        if not names or len(set(names)) < len(names):
            raise ConfigError(f"cases must be different and at least one, got {', '.join(names) or 'none'}")

    def execute(self, echo: Callable[[str], None] = print) -> list[StageResult]:
        """Run every case that is not complete, then write `sweep.md` and `sweep.json`."""
        workdir = Path(self.run.workdir)
        results: list[StageResult] = []
        found: dict[str, Any] = {}
        for case in self.cases:
            echo(f"case {case.name}")
            folder = workdir / case.name
            run = replace(case.config.run, workdir=str(folder))
            results += replace(case.config, run=run).execute(echo)
            found[case.name] = json.loads((folder / "results.json").read_text())
        write_json_atomic(workdir / "sweep.json", found)
        write_atomic(workdir / "sweep.md", "\n".join(sweep_lines(self.cases, found)) + "\n")
        echo(f"the table: {workdir / 'sweep.md'}")
        return results


def sweep_lines(cases: Sequence[Case], found: Mapping[str, Any]) -> list[str]:
    """A row a case: the loss of each arm at its best, the fraction closed, and the differences that are the claim."""
    differences = ("repetition - sbp", "random_pair - sbp", "self_samples - sbp")
    lines = [f"| varied | value | {' | '.join(ARMS)} | of the oracle's gain | {' | '.join(differences)} |"]
    lines.append("|---|---|" + "---|" * (len(ARMS) + 1 + len(differences)))
    for case in cases:
        numbers = found[case.name]
        losses = [_mean(numbers["nats_per_token"].get(arm), "{:.4f}") for arm in ARMS]
        fraction = numbers["fraction_of_oracle_gain"].get("sbp")
        closed = "undefined" if fraction is None else f"{100 * fraction['mean']:.1f} %"
        gains = [_mean(numbers["differences"].get(name), "{:+.4f}") for name in differences]
        lines.append(f"| {case.varied} | {case.value} | {' | '.join([*losses, closed, *gains])} |")
    return lines


def _mean(found: Mapping[str, Any] | None, form: str) -> str:
    return "-" if found is None else form.format(found["mean"])
