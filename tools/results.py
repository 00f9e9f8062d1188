"""Run folders to Markdown: every number in the README comes from here, with config, commit, hardware and seeds.

    python -m tools.results runs/ladder_cpu                         prints the table of that folder
    python -m tools.results --into README.md                        fills in every marked block and every marked row

A block is marked by two lines, `<!-- results: FOLDER -->` and `<!-- end of results -->`; what stands between them is
replaced by the table of FOLDER (relative to --root). A row of a table is marked by `<!-- result: FOLDER -->` in its last
cell, which is replaced by one line of results: the other cells say in words what was measured and by which command. A
folder that is not there leaves its block or row alone and is named.
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

_BLOCK = re.compile(r"(<!-- results: (?P<folder>\S+) -->\n).*?(?P<end><!-- end of results -->)", re.DOTALL)
_ROW = re.compile(
    r"^(\|.*(?<!\\)\| )(?:\\\||[^|\n])*?(?P<end><!-- result: (?P<folder>\S+) --> \|)$", re.MULTILINE
)
UNKNOWN = "not recorded"


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Results:
    """What a run folder says.

    Attributes:
      table: Markdown.
      line: the same in one line, for a cell of a table.
      facts: what it was made with: sizes, times, commands.
      origin: see pretrain/origin.py; what it lacks is not recorded.
      hardware: when the run itself knows better than its origin.
    """

    folder: Path
    table: str
    line: str
    facts: str
    origin: Mapping[str, Any]
    hardware: str = ""
    seeds: str = ""

    @property
    def source(self) -> str:
        """Hardware, commit and seeds."""
        said = [f"hardware {self.hardware or self.origin.get('hardware', UNKNOWN)}"]
        said.append(f"commit {self.origin.get('commit', UNKNOWN)}")
        if self.seeds:
            said.append(f"seeds {self.seeds}")
        return "; ".join(said)

    def page(self) -> str:
        """The table and one line about where it is from."""
        return f"{self.table}\n\nFrom `{self.folder.as_posix()}`; {self.facts}; {self.source}.\n"

    def cell(self) -> str:
        """The last cell of a row: the line and where it is from."""
        return f"{self.line} ({self.facts}; {self.source})".replace("|", "\\|").replace("\n", " ")


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


def training_results(folder: Path) -> Results:
    """A run of pretrain.main: held-out text beside baselines, or the last words of another objective.

    Raises:
      ConfigError: it ended without a score.
    """
    summary, config = read_json(folder / "summary.json"), read_json(folder / "config.json")
    score = summary.get("val_bits_per_byte")
    if score is None and "val_bits_per_byte" in summary:
        raise ConfigError(
            f"a training run must have held-out bits per byte to be tabulated, {folder} has none: nothing was held out "
            "(data.heldout_percent)"
        )
    if score is None:
        *said, _ = summary["closing"]  # the last line is of parameters and time
        table, line = "\n".join(f"- {words}" for words in said), "; ".join(said)
    else:
        others = sorted(summary["baseline_bits_per_byte"].items(), key=lambda pair: pair[1])
        rows = sorted([("this model", score), *others], key=lambda pair: pair[1])
        table = markdown(("held-out text", "bits per byte"), [(name, f"{value:.4f}") for name, value in rows])
        line = f"{score:.3f} bits per byte held out"
        line += "".join(f"; {name} {value:.3f}" for name, value in others)
    facts = [
        f"{summary['params']:,} parameters",
        f"step {summary['steps']:,} of {summary['num_steps']:,}",
        f"{summary['train_tokens']:,} tokens",
        f"{summary['seconds'] / 60:.1f} minutes",
    ]
    if summary["tokens_per_second"] is not None:  # a run too short to have logged a rate
        facts.append(f"{summary['tokens_per_second']:,.0f} tokens/s")
    origin = summary.get("origin", {})
    # The run knows its devices, its origin which processor they are.
    hardware = f"{summary['device']} of {origin['hardware']}" if origin else summary["device"]
    return Results(
        folder=folder, table=table, line=line, facts=", ".join(facts), origin=origin, hardware=hardware,
        seeds=str(config["run"]["seed"]),
    )  # fmt: skip


def bench_table(folder: Path) -> str:
    """The page of tools.bench: ratios with their ranges, what was left out, and the commands."""
    return bench_results(folder).page()


def bench_results(folder: Path) -> Results:
    """The benchmarks of tools.bench."""
    report = read_json(folder / "bench.json")
    records = report["benchmarks"]
    ratios = [Ratio(**row) for record in records.values() for row in record["rows"]]
    parts = [_ratio_table(ratios)] if ratios else []
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
    return Results(
        folder=folder, table="\n\n".join(parts), line=_ratio_line(ratios), facts=facts, origin=places
    )


def _ratio_table(ratios: Sequence[Ratio]) -> str:
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
    return markdown(("ours", "over", "median [range]", "pairs", "note"), rows)


def _ratio_line(ratios: Sequence[Ratio]) -> str:
    said = [
        f"{r.what}: {r.ours} {r.median:.2f} [{r.least:.2f}..{r.greatest:.2f}] x the {r.ratio_of} of {r.peer}, {r.pairs} pairs"
        for r in ratios
    ]
    return "; ".join(said)


def step_ratios(report: Mapping[str, Any]) -> list[Ratio]:
    """Rows of a report of tools.bench_step.

    Raises:
      ConfigError: a peer was in no turn with ours.
    """
    _, *peers = report["entrants"]
    rows = []
    for peer in peers:
        if "our_speed" not in peer:
            raise ConfigError(
                f"{peer['name']} must be timed in a turn with ours, got none: other processes took the machine; "
                "wait for a quiet one or give max_foreign=1"
            )
        least, greatest = peer["our_speed_range"]
        note = f"{report['shape']['name']} parameters, {report['dropped_blocks']} blocks dropped because others worked"
        rows.append(
            Ratio(
                what="training step", ours="pretrain.step", peer=peer["name"], ratio_of="speed", median=peer["our_speed"],
                least=least, greatest=greatest, pairs=peer["pairs"], note=note,
            )
        )  # fmt: skip
    return rows


def step_bench_results(path: Path) -> Results:
    """A report of tools.bench_step: our step beside those of others."""
    report = read_json(path)
    ratios = step_ratios(report)
    facts = f"{report['shape']['name']} parameters, {report['dtype']}, {report['turns']} turns"
    return Results(
        folder=path, table=_ratio_table(ratios), line=_ratio_line(ratios), facts=facts, origin=report.get("origin", {})
    )  # fmt: skip


def generation_ratios(report: Mapping[str, Any]) -> list[Ratio]:
    """Rows of a report of tools.bench_generate, by the clock and by processor time."""
    asked = report["options"]
    what = f"generation, {Path(asked['folder']).name}, {asked['batch']} texts, {asked['new_tokens']} tokens after {asked['prompt_tokens']}"
    rows = []
    for name, entry in report["entrants"].items():
        for key, measure in (("our_speed", "clock"), ("our_processor_speed", "processor time")):
            if key in entry:
                note = f"by {measure}; {entry['same_ids_as_ours']:.1%} of ids the same"
                rows.append(
                    Ratio(
                        what=what, ours="pretrain.generate", peer=name, ratio_of="speed", **entry[key],
                        pairs=asked["pairs"], note=note,
                    )
                )  # fmt: skip
    return rows


def generation_results(path: Path) -> Results:
    """A report of tools.bench_generate: our sampler beside those of others."""
    report = read_json(path)
    ratios = generation_ratios(report)
    by_clock = [r for r in ratios if r.note.startswith("by clock")]
    return Results(
        folder=path, table=_ratio_table(ratios), line=_ratio_line(by_clock), facts="float32, greedy",
        origin=report.get("origin", {}),
    )  # fmt: skip


def step_results(path: Path) -> Results:
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
    return Results(
        folder=path, table=markdown(("training step", "value"), rows),
        line=", ".join(f"{name} {value}" for name, value in rows), facts=facts, origin=report.get("origin", {}),
        hardware=report["device"],
    )  # fmt: skip


def kill_results(folder: Path) -> Results:
    """A kill test: where the kills fell, and whether any end differed from that of a run left alone."""
    report = read_json(folder / "kill_test.json")
    line = (
        f"{len(report['kills'])} kills over {len(report['runs'])} runs, {report['differences']} differences in parameters, "
        f"losses or score, {report['damaged_checkpoints']} damaged checkpoints"
    )
    table = markdown(("killed in", "times"), list(report["phases"].items()))
    facts = "killed in " + ", ".join(f"{phase} {count}" for phase, count in report["phases"].items())
    return Results(
        folder=folder, table=f"{table}\n\n{line}", line=line, facts=facts, origin=report.get("origin", {}),
        seeds=str(report["seed"]),
    )  # fmt: skip


def ladder_results(folder: Path) -> Results:
    """A ladder of pretrain.scaling."""
    report = read_json(folder / "report.json")
    found = report["fit"]
    rows = [
        (name, f"{value:.4g}", "[{:.4g}, {:.4g}]".format(*found["intervals"][name]))
        for name, value in found["values"].items()
    ]
    said = []
    for p in report["predictions"]:
        low, high = p["interval"]
        words = f"predicted {p['predicted']:.4f}, measured {p['measured']:.4f}, error {p['error']:+.2%}"
        rows.append((f"held-out run {p['cell']}", words, f"[{low:.4f}, {high:.4f}]"))
        said.append(
            f"held-out run: loss {p['measured']:.3f}, predicted {p['predicted']:.3f} [{low:.3f}, {high:.3f}], error {p['error']:+.1%}"
        )
    for fitted in report["repetition"]:
        name = "R_star" if "R_star" in fitted["values"] else "P"
        interval = "[{:.4g}, {:.4g}]".format(*fitted["intervals"][name])
        rows.append((f"{name} of {fitted['law']}", f"{fitted['values'][name]:.4g}", interval))
        said.append(" ".join(rows[-1]))
    for m in report["multipliers"]:
        interval = "[{:.3f}, {:.3f}]".format(*m["interval"])
        rows.append((f"effective compute of {m['arm']}", f"{m['value']:.3f}", interval))
        said.append(" ".join(rows[-1]))
    if not said:
        said = [" ".join(row) for row in rows]
    table = markdown(("constant", "value", f"{found['confidence']:.0%} interval"), rows)
    doubts = [f"not supported by these data: {doubt}" for doubt in report["doubts"]]
    minutes = sum(cell["seconds"] for cell in report["cells"]) / 60
    facts = "; ".join([f"{len(report['cells'])} runs, {minutes:.1f} process minutes", *doubts])
    seeds = ", ".join(str(seed) for seed in sorted({cell["seed"] for cell in report["cells"]}))
    return Results(
        folder=folder, table=table, line="; ".join(said), facts=facts, origin=report.get("origin", {}), seeds=seeds
    )  # fmt: skip


def transfer_results(folder: Path) -> Results:
    """A change that research found, on a ladder: what it was worth there and here."""
    report = read_json(folder / "transfer.json")
    low, high = report["interval"]
    there = "not confirmed"
    if report["campaign_gain"] is not None:
        ends = "[{:+.3f}, {:+.3f}]".format(*report["campaign_interval"])
        there = f"{report['campaign_gain']:+.3f} {ends}"
    rows = [
        (f"{row['budget_flops']:.3g}", row["pairs"], f"{row['multiplier']:.3f}", f"{row['loss_difference']:+.4f}")
        for row in report["budgets"]
    ]  # fmt: skip
    line = (
        f"gain in the campaign {there}; here {report['multiplier']:.2f} [{low:.2f}, {high:.2f}] times the compute, "
        f"{report['pairs']} pairs: {report['verdict']}"
    )
    ladder = read_json(folder / "report.json")
    seeds = ", ".join(str(seed) for seed in sorted({cell["seed"] for cell in ladder["cells"]}))
    return Results(
        folder=folder, table=markdown(("budget, FLOPs", "pairs", "multiplier", "loss difference, nats"), rows) + f"\n\n{line}",
        line=line, facts=f"up to {report['largest_params']:,} parameters; replayed {', '.join(report['replayed'])}",
        origin=ladder.get("origin", {}), seeds=seeds,
    )  # fmt: skip


def arms_results(folder: Path) -> Results:
    """An experiment of synth with arms, or bootstrapped pretraining: the tables of its own page."""
    text = (folder / "results.md").read_text()
    tables = re.findall(r"(?:^\|.*\n)+", text + "\n", re.MULTILINE)
    if not tables:
        raise ConfigError(f"{folder}/results.md must hold a table; run the experiment to its end")
    header, _, *rows = (
        [c.strip() for c in row.strip("|").split("|")] for row in tables[0].strip().splitlines()
    )
    said = "; ".join(", ".join(f"{h} {c}" if i else c for i, (h, c) in enumerate(zip(header, row, strict=True))) for row in rows)  # fmt: skip
    return Results(
        folder=folder,
        table=tables[0].strip(),
        line=said,
        facts="first table of its results.md",
        origin={},
    )


def research_results(folder: Path) -> Results:
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
    said = "; ".join(f"{r[0]}: {r[1]} executed, best gain {r[3]}, corrected {r[4]}, {r[5]} promoted" for r in rows)  # fmt: skip
    return Results(
        folder=folder, table=markdown(header, rows), line=said, facts=facts, origin=summary.get("origin", {})
    )


def ideator_results(folder: Path) -> Results:
    """An experiment of research_env.rl: what learning did to the mean and to the best of an epoch."""
    summary, config = read_json(folder / "summary.json"), read_json(folder / "config.json")
    rows = []
    for row in summary["variants"]:
        moved = [
            f"{row['start'][key]['value']:.3f} -> {row['end'][key]['value']:.3f} [{row['end'][key]['low']:.3f}, {row['end'][key]['high']:.3f}]"
            for key in ("mean", "maximum")
        ]
        rows.append((row["name"], *moved, "yes" if row["cures"] else "no"))
    said = "; ".join(f"{name}: mean {mean}, best of an epoch {best}" for name, mean, best, _ in rows)
    return Results(
        folder=folder,
        table=markdown(("variant", "mean", "best of an epoch", "cures"), rows),
        line=said,
        facts=f"{summary['num_epochs']} epochs of {summary['samples_per_epoch']} ideas, without change {summary['baseline_value']:.3f}",
        origin=summary.get("origin", {}),
        seeds=", ".join(map(str, config["seeds"])),
    )


def study_results(folder: Path) -> Results:
    """A study of pretrain.rl: held-out answers right, by seed and teacher. Commit and hardware are those of its runs."""
    arms = read_json(folder / "study.json")
    names = list(dict.fromkeys(arm["name"] for arm in arms))
    seeds = list(dict.fromkeys(arm["seed"] for arm in arms))
    of = {(arm["seed"], arm["name"]): arm for arm in arms}
    rows = [(seed, *(f"{of[seed, name]['accuracy']:.1%}" for name in names)) for seed in seeds]
    said = "; ".join(f"{name} {', '.join(row[index] for row in rows)}" for index, name in enumerate(names, 1))
    (params,) = {arm["params"] for arm in arms}
    (problems,) = {arm["num_problems"] for arm in arms}
    minutes = sum(arm["seconds"] for arm in arms) / 60
    steps = {arm["curve"][-1][0] for arm in arms if arm["name"] == "reward" and arm["curve"]}
    facts = f"{params:,} parameters, {problems} held-out problems, greedy, {minutes:.1f} process minutes"
    if steps:
        facts += f", {', '.join(map(str, sorted(steps)))} steps"
    runs = [folder.parent / name for name in names]
    origin = {key: ", ".join(found) for key in ("commit", "hardware") if (found := _origins(runs, key))}
    return Results(
        folder=folder, table=markdown(("seed", *names), rows), line=said, facts=facts, origin=origin,
        seeds=", ".join(map(str, seeds)),
    )  # fmt: skip


def _origins(folders: Sequence[Path], key: str) -> list[str]:
    """What the training runs right below these folders say of their origin, each once."""
    found = set()
    for folder in folders:
        for path in sorted(folder.glob("*/summary.json")):
            found.add(read_json(path).get("origin", {}).get(key, UNKNOWN))
    return sorted(found)


def evaluation_results(folder: Path) -> Results:
    """A table of pretrain.evaluate: every task's metrics with their intervals, beside the base where there is one."""
    report = read_json(folder / "results.json")
    rows, said = [], []
    for task, entry in report["tasks"].items():
        for name, found in entry["metrics"].items():
            value = f"{found['value']:.4f}"
            if found["low"] is not None:
                value += f" [{found['low']:.4f}, {found['high']:.4f}]"
            base = f"{entry['base'][name]['value']:.4f}" if "base" in entry else ""
            rows.append((f"{task} v{entry['version']}", name, value, base))
            said.append(f"{task} {name} {value}" + (f", base {base}" if base else ""))
    return Results(
        folder=folder, table=markdown(("task", "metric", "value [interval]", "base"), rows), line="; ".join(said),
        facts="intervals over items", origin=report.get("origin", {}), seeds=str(report["config"]["seed"]),
    )  # fmt: skip


def _is_report(*keys: str) -> Callable[[Path], bool]:
    """A JSON file with these entries."""

    def matches(path: Path) -> bool:
        return path.is_file() and path.suffix == ".json" and set(keys) <= set(read_json(path))

    return matches


def _holds(*names: str, entry: str | None = None) -> Callable[[Path], bool]:
    """A folder with these files, the last of them with an entry of its JSON object."""

    def matches(folder: Path) -> bool:
        there = all((folder / name).is_file() for name in names)
        return there and (entry is None or entry in read_json(folder / names[-1]))

    return matches


# The first that matches: a transfer is also a ladder.
KINDS: tuple[tuple[str, Callable[[Path], bool], Callable[[Path], Results]], ...] = (
    ("benchmarks", _holds("bench.json"), bench_results),
    ("a report of bench_step", _is_report("turns", "entrants"), step_bench_results),
    ("of bench_generate", _is_report("options", "entrants"), generation_results),
    ("of bench_train", _is_report("mfu_packed"), step_results),
    ("a kill test", _holds("kill_test.json"), kill_results),
    ("a transfer", _holds("report.json", "transfer.json"), transfer_results),
    ("a ladder", _holds("report.html", "report.json"), ladder_results),
    ("a study of rewards", _holds("study.json"), study_results),
    ("an experiment with arms", _holds("results.md"), arms_results),
    ("an evaluation", _holds("results.json", entry="tasks"), evaluation_results),
    ("a campaign", _holds("index.html", "summary.json", entry="arms"), research_results),
    ("an experiment of ideators", _holds("summary.json", entry="variants"), ideator_results),
    ("a training run", _holds("summary.json"), training_results),
)


def results_of(folder: Path) -> Results:
    """What a run folder or a report says; a folder that holds exactly one run of a config stands for it.

    Raises:
      ConfigError: the folder holds no finished results.
    """
    if not folder.exists():
        raise ConfigError(f"{folder} is not there; run its command first")
    for _, matches, read in KINDS:
        if matches(folder):
            try:
                return read(folder)
            except KeyError as error:
                raise ConfigError(f"{folder} must hold what today's code writes, it lacks {error}") from error
    inside = (
        [child for child in sorted(folder.iterdir()) if (child / "summary.json").is_file()]
        if folder.is_dir()
        else []
    )
    if len(inside) == 1:
        return training_results(inside[0])
    kinds = ", ".join(name for name, _, _ in KINDS)
    raise ConfigError(f"a results folder must be {kinds}, finished; {folder} is none")


def fill_in(text: str, root: Path) -> tuple[str, list[str]]:
    """The document with every block and every row filled in, and what could not be filled in."""
    absent: list[str] = []

    def filled(write: Callable[[Results], str]) -> Callable[[re.Match[str]], str]:
        def replace(match: re.Match[str]) -> str:
            try:
                found = results_of(root / match["folder"])
                return (
                    match[1] + write(dataclasses.replace(found, folder=Path(match["folder"]))) + match["end"]
                )
            except ConfigError as error:
                absent.append(str(error))
                return match[0]

        return replace

    text = _BLOCK.sub(filled(Results.page), text)
    return _ROW.sub(filled(lambda found: found.cell() + " "), text), absent


def main(argv: Sequence[str]) -> int:
    """The return value is the process' exit code (2: bad input, 1: some folders are not there)."""
    parser = argparse.ArgumentParser(prog="python -m tools.results", description=__doc__.split("\n\n")[0])
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--into", type=Path, help="a document with marked blocks")
    parser.add_argument("--root", type=Path, default=Path("."), help="where the folders of the blocks lie")
    arguments = parser.parse_args(argv)
    try:
        for folder in arguments.folders:
            print(results_of(folder).page())
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
