"""Run folders to Markdown tables: every number in the README comes from here, with config, commit, hardware and seeds.

    python -m tools.results runs/scaling/ladder_cpu                 prints the table of that folder
    python -m tools.results --into README.md                        fills in every marked block

A block is marked by two lines, `<!-- results: FOLDER -->` and `<!-- end of results -->`; what stands between them is
replaced by the table of FOLDER (relative to --root). A folder that is not there leaves its block alone and is named.
"""

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pretrain.config import ConfigError
from pretrain.rundir import write_atomic

_BLOCK = re.compile(r"(<!-- results: (?P<folder>\S+) -->\n)(?P<old>.*?)(<!-- end of results -->)", re.DOTALL)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ratio:
    """Ours over a peer's in interleaved pairs: a line of a table of benchmarks.

    Attributes:
      ratio_of: "speed", where above 1 ours is faster, or "seconds", where above 1 ours takes longer.
    """

    what: str
    ours: str
    peer: str
    ratio_of: str
    median: float
    least: float
    greatest: float
    pairs: int
    note: str


def markdown(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table; the first column is text, the others stand at the right."""
    lines = [f"| {' | '.join(header)} |", f"|---|{'---:|' * (len(header) - 1)}"]
    lines += [f"| {' | '.join(str(cell) for cell in row)} |" for row in rows]
    return "\n".join(lines)


def read_json(path: Path) -> Any:
    """ConfigError when it is not there or not whole."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} must be a JSON file: {error}") from error


# --- one kind of folder each -----------------------------------------------------------------------------


def training_table(folder: Path) -> str:
    """A run of pretrain.main that was scored on held-out text.

    Raises:
      ConfigError: it was not: an objective with another score, or nothing held out.
    """
    summary, config = read_json(folder / "summary.json"), read_json(folder / "config.json")
    if summary.get("val_bits_per_byte") is None:
        raise ConfigError(
            f"a training run must have held-out bits per byte to be tabulated, {folder} has none: its objective is another, "
            "or nothing was held out (data.heldout_percent)"
        )
    rows = [("this model", f"{summary['val_bits_per_byte']:.4f}")]
    rows += [(name, f"{value:.4f}") for name, value in summary["baseline_bits_per_byte"].items()]
    rows.sort(key=lambda row: float(row[1]))
    facts = [
        f"{summary['params']:,} parameters",
        f"step {summary['steps']:,} of {summary['num_steps']:,}",
        f"{summary['train_tokens']:,} tokens",
        f"{summary['seconds'] / 60:.1f} minutes",
    ]
    if summary["tokens_per_second"] is not None:  # a run too short to have logged a rate
        facts.append(f"{summary['tokens_per_second']:,.0f} tokens/s")
    seeds = str(config["run"]["seed"])
    return _with_source(
        markdown(("held-out text", "bits per byte"), rows),
        folder,
        ", ".join(facts),
        summary,
        hardware=summary["device"],
        seeds=seeds,
    )


def bench_table(folder: Path) -> str:
    """The benchmarks of tools.bench: ratios with their ranges, what was left out, and the commands."""
    report = read_json(folder / "bench.json")
    records = report["benchmarks"]
    ratios = [Ratio(**row) for record in records.values() for row in record["rows"]]
    rows = [
        (
            f"{r.what}: {r.ours}",
            r.peer,
            f"{r.median:.2f} [{r.least:.2f}..{r.greatest:.2f}] x {r.ratio_of}",
            r.pairs,
            r.note,
        )
        for r in ratios
    ]
    parts = [markdown(("ours", "over", "median [range]", "pairs", "note"), rows)] if rows else []
    absent = [
        *(f"- {name} was left out: {reason}" for name, reason in report["left_out"].items()),
        *(f"- {name} failed: {reason}" for name, reason in report["failed"].items()),
        *(f"- {name}, {what} left out: {reason}" for name, r in records.items() for what, reason in r["left_out"].items()),
    ]  # fmt: skip
    if absent:
        parts.append("\n".join(absent))
    commands = "; ".join(f"`python -m {' '.join(record['command'])}`" for record in records.values())
    origins = [record["origin"] for record in records.values()]
    places = {key: ", ".join(sorted({origin[key] for origin in origins})) for key in ("hardware", "commit") if origins}  # fmt: skip
    facts = "ours over the other's; of speed, more is better, of seconds, less; commands " + (
        commands or "none"
    )
    return _with_source("\n\n".join(parts), folder, facts, places)


def step_table(path: Path) -> str:
    """A report of tools.bench_train: one training step on one device."""
    report = read_json(path)
    least_s, greatest_s = report["step_range_s"]
    rows = [
        ("tokens/s", f"{report['tokens_per_second']:,.0f}"),
        ("step, ms", f"{1e3 * report['step_s']:.1f} [{1e3 * least_s:.1f}..{1e3 * greatest_s:.1f}]"),
        *((name, f"{report[name]:.1%}") for name in ("mfu", "mfu_packed", "hfu")),
    ]
    facts = (
        f"{report['params']:,} parameters, {report['rows']} rows of {report['row_length']} in {report['microbatches']} "
        f"microbatches, attention {report['attention']}, remat {report['remat']}, jax {report['jax']}, peak {report['peak']}"
    )
    return _with_source(markdown(("training step", "value"), rows), path, facts, report, hardware=report["device"])  # fmt: skip


def kill_table(folder: Path) -> str:
    """A kill test: where the kills fell, and whether any end differed from that of a run left alone."""
    report = read_json(folder / "kill_test.json")
    rows = [(phase, count) for phase, count in report["phases"].items()]
    facts = (
        f"{len(report['kills'])} kills over {len(report['runs'])} runs, {report['differences']} differences in parameters, "
        f"losses or score, {report['damaged_checkpoints']} damaged checkpoints"
    )
    return _with_source(markdown(("killed in", "times"), rows), folder, facts, report, seeds=str(report["seed"]))  # fmt: skip


def ladder_table(folder: Path) -> str:
    """A ladder of pretrain.scaling."""
    report = read_json(folder / "report.json")
    found = report["fit"]
    rows = [
        (name, f"{value:.4g}", "[{:.4g}, {:.4g}]".format(*found["intervals"][name]))
        for name, value in found["values"].items()
    ]
    for p in report["predictions"]:
        said = f"predicted {p['predicted']:.4f}, measured {p['measured']:.4f}, error {p['error']:+.2%}"
        rows.append((f"held-out run {p['cell']}", said, "[{:.4f}, {:.4f}]".format(*p["interval"])))
    for fitted in report["repetition"]:
        name = "R_star" if "R_star" in fitted["values"] else "P"
        interval = "[{:.4g}, {:.4g}]".format(*fitted["intervals"][name])
        rows.append((f"{name} of {fitted['law']}", f"{fitted['values'][name]:.4g}", interval))
    for m in report["multipliers"]:
        rows.append(
            (
                f"effective compute of {m['arm']}",
                f"{m['value']:.3f}",
                "[{:.3f}, {:.3f}]".format(*m["interval"]),
            )
        )
    table = markdown(("constant", "value", f"{found['confidence']:.0%} interval"), rows)
    doubts = [f"not supported by these data: {doubt}" for doubt in report["doubts"]]
    facts = "; ".join([f"{len(report['cells'])} runs", *doubts])
    seeds = ", ".join(sorted({str(cell["seed"]) for cell in report["cells"]}))
    return _with_source(table, folder, facts, report.get("origin", {}), seeds=seeds)


def arms_table(folder: Path) -> str:
    """An experiment of synth with arms, or bootstrapped pretraining: the tables of its own page."""
    text = (folder / "results.md").read_text()
    tables = re.findall(r"(?:^\|.*\n)+", text + "\n", re.MULTILINE)
    if not tables:
        raise ConfigError(f"{folder}/results.md must hold a table; run the experiment to its end")
    return _with_source(tables[0].strip(), folder, "first table of its results.md", {})


def research_table(folder: Path) -> str:
    """A campaign of research_env."""
    summary = read_json(folder / "summary.json")
    rows = []
    for arm in summary["arms"]:
        gain = "none" if arm["best_gain"] is None else f"{arm['best_gain']:+.4f}"
        corrected = "none" if arm["corrected_gain"] is None else f"{arm['corrected_gain']:+.4f}"
        rows.append((arm["arm"], arm["executed"], arm["ok"], gain, corrected, arm["promoted"]))
    header = ("arm", "executed", "ran well", "best gain", "corrected for choosing", "promoted on fresh seeds")
    facts = (
        f"baseline {summary['metric']} {summary['baseline']:.4f}, noise {summary['sigma0']:.4f} over "
        f"{summary['noise_repeats']} seeds, isolation {summary['isolation']}"
    )
    return _with_source(markdown(header, rows), folder, facts, summary)


def _with_source(
    table: str, folder: Path, facts: str, origin: Mapping[str, Any], *, hardware: str = "", seeds: str = ""
) -> str:
    """The table and one line about where it is from."""
    said = [f"`{folder.as_posix()}`", facts]
    said.append(f"hardware {hardware or origin.get('hardware', 'not recorded')}")
    said.append(f"commit {origin.get('commit', 'not recorded')}")
    if seeds:
        said.append(f"seeds {seeds}")
    return f"{table}\n\nFrom {'; '.join(said)}.\n"


KINDS: tuple[tuple[str, Callable[[Path], bool], Callable[[Path], str]], ...] = (
    ("benchmarks", lambda f: (f / "bench.json").is_file(), bench_table),
    ("a step of bench_train", lambda f: f.is_file() and "mfu_packed" in read_json(f), step_table),
    ("a kill test", lambda f: (f / "kill_test.json").is_file(), kill_table),
    ("a ladder", lambda f: (f / "report.json").is_file() and (f / "report.html").is_file(), ladder_table),
    ("an experiment with arms", lambda f: (f / "results.md").is_file(), arms_table),
    ("a campaign", lambda f: (f / "summary.json").is_file() and (f / "index.html").is_file(), research_table),
    ("a training run", lambda f: (f / "summary.json").is_file(), training_table),
)


def table_of(folder: Path) -> str:
    """The table of a run folder; a folder that holds exactly one run of a config stands for it.

    Raises:
      ConfigError: the folder holds no finished results.
    """
    for _, matches, make in KINDS:
        if matches(folder):
            return make(folder)
    inside = (
        [child for child in sorted(folder.iterdir()) if (child / "summary.json").is_file()]
        if folder.is_dir()
        else []
    )
    if len(inside) == 1:
        return training_table(inside[0])
    kinds = ", ".join(name for name, _, _ in KINDS)
    raise ConfigError(f"a results folder must be {kinds}, finished; {folder} is none")


def fill_in(text: str, root: Path) -> tuple[str, list[str]]:
    """The document with every block filled in, and what could not be filled in."""
    absent: list[str] = []

    def replace(match: re.Match[str]) -> str:
        try:
            return match[1] + table_of(root / match["folder"]).replace(f"{root.as_posix()}/", "") + match[4]
        except ConfigError as error:
            absent.append(str(error))
            return match[0]

    return _BLOCK.sub(replace, text), absent


def main(argv: Sequence[str]) -> int:
    """The return value is the process' exit code (2: bad input, 1: some folders are not there)."""
    parser = argparse.ArgumentParser(prog="python -m tools.results", description=__doc__.split("\n\n")[0])
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--into", type=Path, help="a document with marked blocks")
    parser.add_argument("--root", type=Path, default=Path("."), help="where the folders of the blocks lie")
    arguments = parser.parse_args(argv)
    try:
        for folder in arguments.folders:
            print(table_of(folder))
        if arguments.into is None:
            return 0
        if not arguments.into.is_file():
            raise ConfigError(f"--into must name a document, got {arguments.into}, which is not there")
        text, absent = fill_in(arguments.into.read_text(), arguments.root)
        write_atomic(arguments.into, text)
        for line in absent:
            print(f"left alone: {line}", file=sys.stderr)
        return 1 if absent else 0
    except ConfigError as error:
        for fault in error.faults:
            print(f"error: {fault}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
