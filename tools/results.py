"""Run folders to Markdown tables: every number in the README comes from here, with config, commit, hardware and seeds.

    python -m tools.results runs/scaling/ladder_cpu                 prints the table of that folder
    python -m tools.results --into README.md                        fills in every marked block

A block is marked by two lines, `<!-- results: FOLDER -->` and `<!-- end of results -->`; what stands between them is
replaced by the table of FOLDER (relative to --root). A folder that is not there leaves its block alone and is named.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pretrain.config import ConfigError
from pretrain.rundir import write_atomic

_BLOCK = re.compile(r"(<!-- results: (?P<folder>\S+) -->\n)(?P<old>.*?)(<!-- end of results -->)", re.DOTALL)


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
    """A run of pretrain.main."""
    summary, config = read_json(folder / "summary.json"), read_json(folder / "config.json")
    rows = [("this model", f"{summary['val_bits_per_byte']:.4f}")]
    rows += [(name, f"{value:.4f}") for name, value in summary["baseline_bits_per_byte"].items()]
    rows.sort(key=lambda row: float(row[1]))
    facts = (
        f"{summary['params']:,} parameters, {summary['train_tokens']:,} tokens, {summary['tokens_per_second']:,.0f} tokens/s, "
        f"{summary['seconds'] / 60:.1f} minutes"
    )
    seeds = str(config["run"]["seed"])
    return _with_source(
        markdown(("held-out text", "bits per byte"), rows),
        folder,
        facts,
        summary,
        hardware=summary["device"],
        seeds=seeds,
    )


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
