"""Our training step beside those of peers on this machine: interleaved blocks, medians and ranges, one table.

    python -m tools.bench_step peers=module:function,module:function shape=0.87m pairs=30 out=bench.json

A peer is a function on PYTHONPATH, `factory(shape) -> (step, info)`. `shape` is a dict of sizes, D L N F V B T as
in the house legend; F is that of a plain feed-forward of two matrices. `step()` runs one training step of B rows
of T tokens in float32 with AdamW and clipping at norm 1, waits for it and returns the loss. `info` is a dict with
`params` and whatever is worth printing. Nothing of a peer lies in this repository.

Every entrant lives in a process of its own, so that thread pools and allocators do not meet, and only one works at
a time. All run `block` steps in turn, in one order and then in the other, `pairs` times; speeds are compared within
a turn. A block during which other processes took more than `max_foreign` of the machine is not counted.
"""

import dataclasses
import importlib
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pretrain.config import ConfigError, apply_overrides
from pretrain.origin import origin
from pretrain.rundir import write_json_atomic

# F is four times D, as in the peers; with learned positions and a tied head they have 869,504 and 9,999,040
# parameters.
SHAPES = {
    "0.87m": {"D": 128, "L": 4, "N": 4, "F": 512, "V": 512, "B": 8, "T": 128},
    "10m": {"D": 320, "L": 7, "N": 5, "F": 1280, "V": 4096, "B": 4, "T": 256},
}
OURS = "tools.our_step:factory"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch")

Step = Callable[[], float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line may say, `key=value`."""

    peers: str = ""  # module:function, separated by commas
    shape: str = "0.87m"
    pairs: int = 10
    block: int = 6  # steps an entrant runs in its turn
    warmup: int = 5  # steps before the first turn, compilation included
    max_foreign: float = 0.06  # share of the machine that others may take during a block; no limit from 1 on
    max_seconds: float = 300.0  # of timing; what was counted until then is reported
    out: str | None = None  # JSON file

    def __post_init__(self):
        faults = [f"a peer must be module:function, got {p!r}" for p in self.factories if p.count(":") != 1]
        if self.shape not in SHAPES:
            faults.append(f"shape must be one of {', '.join(SHAPES)}, got {self.shape!r}")
        faults += [
            f"{name} must be positive, got {getattr(self, name)}"
            for name in ("pairs", "block", "warmup", "max_seconds")
            if getattr(self, name) <= 0
        ]
        if faults:
            raise ConfigError(*faults)

    @property
    def factories(self) -> list[str]:
        """Ours first, then the peers."""
        return [OURS, *(peer for peer in self.peers.split(",") if peer)]


# --- one entrant, in its own process -----------------------------------------------------------------


def load_factory(name: str) -> Callable[[Mapping[str, int]], tuple[Step, dict[str, Any]]]:
    """The function that `module:function` names.

    Raises:
      ConfigError: no such module on the path, or no such function in it.
    """
    module_name, _, function_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ConfigError(f"a peer must be importable, {name!r} is not: {error}; set PYTHONPATH") from error
    if not callable(getattr(module, function_name, None)):
        raise ConfigError(f"a peer must name a function, {module_name} has no {function_name!r}")
    return getattr(module, function_name)


def serve(name: str, shape: Mapping[str, int], warmup: int) -> None:
    """Build a step, then for every line `n` on standard input run it n times and print what it took as JSON."""
    # Frameworks print what they like; the answers go to a descriptor that only we write to.
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)

        def answer(value: Any) -> None:
            print(json.dumps(value), file=answers, flush=True)

        began = time.perf_counter()
        try:
            step, info = load_factory(name)(shape)
        except ConfigError as error:
            answer({"faults": error.faults})
            return
        losses = [float(step()) for _ in range(warmup)]
        setup_s = time.perf_counter() - began
        answer({**info, "setup_s": setup_s, "first_loss": losses[0], "last_warmup_loss": losses[-1]})
        for line in sys.stdin:
            seconds, before = [], resource.getrusage(resource.RUSAGE_SELF)
            for _ in range(int(line)):
                start = time.perf_counter()
                step()
                seconds.append(time.perf_counter() - start)
            after = resource.getrusage(resource.RUSAGE_SELF)
            cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            faults = after.ru_minflt - before.ru_minflt
            answer({"step_s": seconds, "cpu_s": cpu_s, "page_faults": faults})


class Entrant:
    """A process that runs one factory's step on demand, and what its counted blocks took."""

    def __init__(self, name: str, shape: Mapping[str, int], warmup: int):
        self.name = name
        self.step_s: list[list[float]] = []
        self.cpu_s: list[float] = []  # of a step, all threads
        self.page_faults: list[float] = []  # of a step
        root = str(Path(__file__).resolve().parent.parent)
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tools.bench_step", "serve", name, json.dumps(dict(shape)), str(warmup)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        try:
            self.info = self._answer()
            if "faults" in self.info:
                raise ConfigError(*self.info["faults"])
        except ConfigError:
            self.close()
            raise

    def _answer(self) -> Any:
        line = self.process.stdout.readline()
        if not line:
            raise ConfigError(
                f"{self.name} must run on this machine, but its process died; see its message above"
            )
        return json.loads(line)

    def run(self, num_steps: int, max_foreign: float) -> list[float] | None:
        """Seconds of each of `num_steps`, or None when others used too much of the machine meanwhile."""
        start, busy = time.perf_counter(), _busy_s()
        print(num_steps, file=self.process.stdin, flush=True)
        block = self._answer()
        if busy is not None:
            foreign_s = _busy_s() - busy - block["cpu_s"]
            if foreign_s > max_foreign * (time.perf_counter() - start) * os.cpu_count():
                return None
        self.step_s.append(block["step_s"])
        self.cpu_s.append(block["cpu_s"] / num_steps)
        self.page_faults.append(block["page_faults"] / num_steps)
        return block["step_s"]

    def close(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def _busy_s() -> float | None:
    """Seconds that all processors together have worked since boot (stolen time too), where Linux tells."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    ticks = [int(word) for word in stat.read_text().split("\n", 1)[0].split()[1:9]]
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")


# --- the comparison ----------------------------------------------------------------------------------


def compare(entrants: Sequence[Entrant], options: Options) -> dict[str, Any]:
    """Run the turns; what each entrant took, and for each peer our speed over the peer's, turn by turn."""
    ratios: dict[str, list[float]] = {entrant.name: [] for entrant in entrants}
    began, turn, dropped = time.perf_counter(), 0, 0
    while time.perf_counter() - began < options.max_seconds:
        if min(len(r) for r in ratios.values()) >= options.pairs:
            break
        if options.max_foreign < 1:
            _wait_for_quiet()
        medians = {}
        for entrant in entrants if turn % 2 == 0 else entrants[::-1]:
            block = entrant.run(options.block, options.max_foreign)
            if block is None:
                dropped += 1
            else:
                medians[entrant.name] = statistics.median(block)
        turn += 1
        if entrants[0].name in medians:
            for name, median in medians.items():
                ratios[name].append(median / medians[entrants[0].name])
    shape = SHAPES[options.shape]
    tokens = shape["B"] * shape["T"]
    return {
        "shape": {"name": options.shape, **shape},
        "dtype": "float32",
        "origin": origin(),
        "turns": turn,
        "dropped_blocks": dropped,
        "machine": {
            "cores": os.cpu_count(),
            "usable_cores": len(os.sched_getaffinity(0)),
            "processor": platform.processor() or platform.machine(),
            "python": platform.python_version(),
            "xla_flags": os.environ.get("XLA_FLAGS", ""),
            **{name: version for name in PACKAGES if (version := _version(name))},
        },
        "entrants": [_summary(entrant, ratios[entrant.name], tokens) for entrant in entrants],
    }


def _wait_for_quiet(timeout_s: float = 5.0) -> None:
    """Wait for a tenth of a second in which nobody works, but not for ever."""
    deadline = time.perf_counter() + timeout_s
    while (busy := _busy_s()) is not None and time.perf_counter() < deadline:
        time.sleep(0.1)
        if _busy_s() - busy < 0.04:
            return


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _summary(entrant: Entrant, ratios: list[float], tokens: int) -> dict[str, Any]:
    seconds = sorted(s for block in entrant.step_s for s in block)
    out: dict[str, Any] = {"name": entrant.name, **entrant.info, "counted_steps": len(seconds)}
    if seconds:
        out |= {
            "median_s": statistics.median(seconds),
            "iqr_s": [_quantile(seconds, 0.25), _quantile(seconds, 0.75)],
            "range_s": [seconds[0], seconds[-1]],
            "tokens_per_s": tokens / statistics.median(seconds),
            "cpu_s": statistics.median(entrant.cpu_s),
            "page_faults": statistics.median(entrant.page_faults),
        }
    if ratios:
        # Above 1: we are faster than this entrant.
        out |= {
            "our_speed": statistics.median(ratios),
            "our_speed_iqr": [_quantile(sorted(ratios), 0.25), _quantile(sorted(ratios), 0.75)],
            "our_speed_range": [min(ratios), max(ratios)],
            "pairs": len(ratios),
        }
    return out


def _quantile(ordered: Sequence[float], q: float) -> float:
    """The value below which a share `q` of `ordered` lies, linear between neighbors."""
    place = q * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def table(report: Mapping[str, Any]) -> str:
    """The report for people."""
    shape = " ".join(f"{k}={v}" for k, v in report["shape"].items() if k != "name")
    machine = " ".join(f"{k}={v}" for k, v in report["machine"].items() if v)
    lines = [
        f"shape {report['shape']['name']}: {shape} {report['dtype']}",
        machine,
        f"{report['turns']} turns, {report['dropped_blocks']} blocks dropped because others worked",
        f"{'entrant':32}{'params':>11}{'ms':>9}{'quartiles':>16}{'tokens/s':>10}{'cpu ms':>8}{'faults':>8}"
        f"{'we are x':>10}{'quartiles':>14}{'range':>14}{'pairs':>6}",
    ]
    for e in report["entrants"]:
        line = f"{e['name']:32}{e['params']:>11,}"
        if "median_s" in e:
            low, high = (1e3 * s for s in e["iqr_s"])
            line += f"{1e3 * e['median_s']:>9.1f}{f'{low:.1f}..{high:.1f}':>16}{e['tokens_per_s']:>10,.0f}"
            line += f"{1e3 * e['cpu_s']:>8.1f}{e['page_faults']:>8.0f}"
        if "our_speed" in e:
            iqr, whole = ("{:.2f}..{:.2f}".format(*e[k]) for k in ("our_speed_iqr", "our_speed_range"))
            line += f"{e['our_speed']:>10.3f}{iqr:>14}{whole:>14}{e['pairs']:>6}"
        lines.append(line)
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Run the comparison that `argv` asks for; exit code 2 on bad input."""
    if argv[:1] == ["serve"]:
        serve(argv[1], json.loads(argv[2]), int(argv[3]))
        return 0
    entrants: list[Entrant] = []
    try:
        options = apply_overrides(Options(), argv)
        for name in options.factories:
            entrants.append(Entrant(name, SHAPES[options.shape], options.warmup))
        report = compare(entrants, options)
        print(table(report))
        if options.out is not None:
            write_json_atomic(options.out, report)
    except ConfigError as error:
        for fault in error.faults:
            print(f"error: {fault}", file=sys.stderr)
        return 2
    finally:
        for entrant in entrants:
            entrant.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
