"""Every side-by-side benchmark, one after the other, and one table of ratios: ours over the peer's, median and range.

    python -m tools.bench                                                          what needs nothing from outside
    python -m tools.bench peers=module:function folder=MODEL_FOLDER                all of it
    python -m tools.bench out=runs/bench only=pairing,sandbox pairs=10             some of it

`peers` are training steps of others as bench_step takes them, GPT-2 of transformers when none is named; `folder` is a
model as bench_generate takes it. Neither lies in this repository. A benchmark is the command that one would type, in a
process of its own, and takes its entrants in turn. What was not run is listed with its reason; so is what failed, and
the others go on.

`<out>/<benchmark>.json` is written when a benchmark has ended: killed at any moment, the same command goes on with the
next one. Remove the file, or give other arguments, to measure again. The table is `<out>/bench.md`, with the same
numbers in `bench.json`.
"""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pretrain.config import ConfigError, apply_overrides
from pretrain.origin import origin
from pretrain.rundir import RunDir, write_atomic, write_json_atomic
from tools.results import Ratio, bench_table, generation_ratios, step_ratios

MIN_PAIRS = 5
# SIGTERM to the benchmark when this process ends, however it ends: one that goes on alone would disturb its successor.
# The setting (prctl PR_SET_PDEATHSIG, Linux) survives exec.
_LAUNCH = """import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 15)
os.execv(sys.executable, [sys.executable, "-m", *sys.argv[1:]])"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line may say, `key=value`."""

    out: str = "runs/bench"
    only: str = ""  # names, separated by commas; empty: all
    pairs: int = MIN_PAIRS
    peers: str = ""  # training steps, module:function, separated by commas; empty: GPT-2 of transformers
    max_foreign: float = (
        0.06  # share of the machine that others may take while steps are timed; no limit from 1 on
    )
    folder: str = ""  # the model that generation is measured with
    peer_python: str = sys.executable  # where transformers is installed
    num_vectors: int = 100_000  # of pairing
    texts: str = ""  # JSONL folder whose windows are paired; empty: Gaussian clusters

    def __post_init__(self):
        faults = []
        if self.pairs < MIN_PAIRS:
            faults.append(f"pairs must be at least {MIN_PAIRS}, or the ranges say nothing, got {self.pairs}")
        faults += [f"a peer must be module:function, got {p!r}" for p in self.peers.split(",") if p and p.count(":") != 1]  # fmt: skip
        if self.folder and not (Path(self.folder) / "config.json").is_file():
            faults.append(f"folder must hold a model with a config.json, got {self.folder!r}")
        if faults:
            raise ConfigError(*faults)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A command that leaves a report, and how the report becomes rows.

    Attributes:
      absent: why it is left out here, None when it can be run.
      command: what one would type behind `python -m`; its report goes to the path.
      read: the report's rows, and what it left out itself, by name.
    """

    name: str
    absent: Callable[[Options], str | None]
    command: Callable[[Options, Path], list[str]]
    read: Callable[[Path], tuple[list[Ratio], dict[str, str]]]


# --- the benchmarks ----------------------------------------------------------------------------------


STEP_PEER = "tools.peer_transformers:gpt2_step"


def step_absent(options: Options) -> str | None:
    """The packages of the peer that is taken when none is named."""
    absent = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if options.peers or not absent:
        return None
    return f"{' and '.join(absent)} not installed: pip install -e '.[peers]', or give peers=module:function"


def step_benchmark(shape: str) -> Benchmark:
    """Our training step beside those of `peers`."""

    def command(options: Options, report: Path) -> list[str]:
        asked = [f"peers={options.peers or STEP_PEER}", f"shape={shape}", f"pairs={options.pairs}"]
        return ["tools.bench_step", *asked, f"max_foreign={options.max_foreign}", f"out={report}"]

    return Benchmark(
        name=f"step_{shape}",
        absent=step_absent,
        command=command,
        read=read_step,
    )  # fmt: skip


def read_step(report: Path) -> tuple[list[Ratio], dict[str, str]]:
    """Rows of bench_step."""
    return step_ratios(json.loads(report.read_text())), {}


def generation_absent(options: Options) -> str | None:
    """A model, and the peer's package where we can look for it."""
    if not options.folder:
        return "no model folder: give folder=FOLDER (python -m pretrain.export writes one)"
    if options.peer_python == sys.executable and importlib.util.find_spec("transformers") is None:
        return "transformers is not installed: pip install -e '.[peers]', or give peer_python=PYTHON"
    return None


def read_generation(report: Path) -> tuple[list[Ratio], dict[str, str]]:
    """Rows of bench_generate."""
    return generation_ratios(json.loads(report.read_text())), {}


def generation_command(options: Options, report: Path) -> list[str]:
    asked = [f"folder={options.folder}", f"pairs={options.pairs}", "prompt_tokens=64", "new_tokens=64"]
    if options.peer_python != sys.executable:
        asked.append(f"peer_python={options.peer_python}")
    return ["tools.bench_generate", *asked, f"out={report}"]


def pairing_command(options: Options, report: Path) -> list[str]:
    vectors = [f"vectors.num_vectors={options.num_vectors}", f"vectors.texts={options.texts}"]
    return ["tools.bench_peers", "what=pairing", f"pairs={options.pairs}", *vectors, f"out={report}"]


def read_peers(report: Path) -> tuple[list[Ratio], dict[str, str]]:
    """bench_peers writes rows as they are wanted here."""
    said = json.loads(report.read_text())
    return [Ratio(**row) for row in said["rows"]], said["left_out"]


def backend() -> str:
    """What jax computes on, asked in a process of its own: this one must not hold an accelerator."""
    code = "import jax; print(jax.default_backend())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip().rpartition("\n")[2] or "none"


def attention_absent(options: Options) -> str | None:
    found = backend()
    if found in ATTENTION_SIZES:
        return None
    return f"jax sees no GPU and no TPU (backend {found}): on such a machine, pip install -e '.[cuda]' or '.[tpu]'"


def attention_command(options: Options, report: Path) -> list[str]:
    size = f"size={ATTENTION_SIZES[backend()]}"
    return ["tools.bench_attention", size, f"samples={max(20, options.pairs)}", f"out={report.with_suffix('')}"]  # fmt: skip


ATTENTION_SIZES = {"gpu": "h100", "tpu": "tpu"}


def read_attention(report: Path) -> tuple[list[Ratio], dict[str, str]]:
    """Rows of bench_attention: ours beside each peer in the same case.

    It keeps quartiles of times and not its samples, so the ends are the ratios of opposite quartiles: a wider interval
    than the quartiles of the ratios, which it does not know.
    """
    said = json.loads((report.with_suffix("") / "attention.json").read_text())
    left_out = {
        f"{check['impl']}, width {check['width']}": check.get("absent") or f"wrong: {', '.join(check['wrong'])}"
        for check in said["checks"]
        if "absent" in check or check["wrong"]
    }  # fmt: skip
    if said["left_out"]:
        left_out[f"{len(said['left_out'])} cases"] = "the time was up"
    cases: dict[tuple, dict[str, dict]] = {}
    for entry in said["table"]:
        case = tuple(entry[key] for key in ("direction", "width", "length", "packing"))
        cases.setdefault(case, {})[entry["impl"]] = entry
    rows = []
    for (direction, width, length, packing), by_name in cases.items():
        for ours in (name for name in by_name if name.startswith("pallas_")):
            for peer in (name for name in by_name if not name.startswith("pallas_")):
                a, b = by_name[ours], by_name[peer]
                rows.append(
                    Ratio(
                        what=f"attention {direction}, {packing}, width {width}, {length} tokens",
                        ours=ours,
                        peer=peer,
                        ratio_of="speed",
                        median=b["median_ms"] / a["median_ms"],
                        least=b["quartiles_ms"][0] / a["quartiles_ms"][1],
                        greatest=b["quartiles_ms"][1] / a["quartiles_ms"][0],
                        pairs=min(a["samples"], b["samples"]),
                        note=f"quartiles; {said['device']}",
                    )
                )
    return rows, left_out


BENCHMARKS = (
    step_benchmark("0.87m"),
    step_benchmark("10m"),
    Benchmark(
        name="generation", absent=generation_absent, command=generation_command, read=read_generation
    ),
    Benchmark(name="pairing", absent=lambda options: None, command=pairing_command, read=read_peers),
    Benchmark(
        name="sandbox",
        absent=lambda options: None,
        # Milliseconds each: many turns cost nothing.
        command=lambda options, report: ["tools.bench_peers", "what=sandbox", f"pairs={max(30, options.pairs)}", f"out={report}"],
        read=read_peers,
    ),
    Benchmark(name="attention", absent=attention_absent, command=attention_command, read=read_attention),
)  # fmt: skip


# --- running -----------------------------------------------------------------------------------------


def run_benchmark(benchmark: Benchmark, options: Options, say: Callable[[str], None]) -> Mapping[str, Any]:
    """The record of a benchmark that has ended now or before, with the same arguments.

    Raises:
      ConfigError: its command failed, or fewer pairs were counted than were asked for.
    """
    folder = Path(options.out)
    path, log_path, report = (folder / f"{benchmark.name}{end}" for end in (".json", ".log", ".report.json"))
    command = benchmark.command(options, report)
    if path.exists():
        record = json.loads(path.read_text())
        if record["command"] == command:
            say("  ended before")
            return record
        say(f"  ended before with other arguments ({' '.join(record['command'][1:])}): measured again")
    began, last = time.monotonic(), ""
    launch = ("-c", _LAUNCH) if sys.platform == "linux" else ("-m",)
    with (
        open(log_path, "wb") as log,
        subprocess.Popen(
            [sys.executable, *launch, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},  # its lines are shown when they are written
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            log.write(line)
            log.flush()
            last = line.decode(errors="replace").rstrip() or last
            say(f"  {last}")
    if process.returncode:
        raise ConfigError(f"exit code {process.returncode}: {last.removeprefix('error: ')} ({log_path})")
    rows, left_out = benchmark.read(report)
    for row in rows:
        if row.pairs < options.pairs:
            raise ConfigError(
                f"{row.peer} must be timed in {options.pairs} pairs, got {row.pairs} ({row.note}); "
                "run again on a quieter machine or allow more by max_foreign"
            )
    record = {
        "command": command,
        "seconds": time.monotonic() - began,
        "origin": origin(),
        "rows": [dataclasses.asdict(row) for row in rows],
        "left_out": left_out,
    }
    write_json_atomic(path, record)
    return record


def main(argv: Sequence[str], benchmarks: Sequence[Benchmark] = BENCHMARKS) -> int:
    """Run what is missing and write the table; exit code 2 on bad input, 1 when a benchmark failed."""
    try:
        options = apply_overrides(Options(), argv)
        known = [benchmark.name for benchmark in benchmarks]
        wanted = [name for name in options.only.split(",") if name] or known
        if unknown := sorted(set(wanted) - set(known)):
            raise ConfigError(f"only must name benchmarks ({', '.join(known)}), got {', '.join(unknown)}")
        run = RunDir(Path(options.out))
        run.create()
        with run.lock():
            return _run_all(benchmarks, wanted, options)
    except ConfigError as error:
        for fault in error.faults:
            print(f"error: {fault}", file=sys.stderr)
        return 2


def _run_all(benchmarks: Sequence[Benchmark], wanted: Sequence[str], options: Options) -> int:
    """Write the table after each, so that a killed run leaves what it has; what ended before stays in it."""
    report: dict[str, dict[str, Any]] = {"benchmarks": {}, "left_out": {}, "failed": {}}
    folder = Path(options.out)
    for number, benchmark in enumerate(benchmarks, 1):
        name, path = benchmark.name, folder / f"{benchmark.name}.json"
        print(f"[{number}/{len(benchmarks)}] {name}", flush=True)
        reason = "not asked for" if name not in wanted else benchmark.absent(options)
        if reason is not None and path.exists():
            report["benchmarks"][name] = json.loads(path.read_text())
            print(f"  ended before; now {reason}", flush=True)
        elif reason is not None:
            report["left_out"][name] = reason
            print(f"  left out: {reason}", flush=True)
        else:
            try:
                report["benchmarks"][name] = run_benchmark(
                    benchmark, options, lambda line: print(line, flush=True)
                )
            except ConfigError as error:
                report["failed"][name] = str(error)
                print(f"  failed: {error}", flush=True)
        write_json_atomic(folder / "bench.json", report)
        write_atomic(folder / "bench.md", bench_table(folder))
    print(f"\n{bench_table(folder)}\n{folder}/bench.md", flush=True)
    return 1 if report["failed"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
