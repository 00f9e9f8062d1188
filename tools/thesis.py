"""The three curves of the thesis on one machine: run what is missing, then one self-contained HTML page.

    python -m tools.thesis --workdir runs/thesis
    python -m tools.thesis --workdir runs/thesis --only ladder sbp      some of the stages
    python -m tools.thesis --workdir runs/thesis --report               only the page, from what is there

Every stage is the command that one would type, in a process of its own; killed at any moment, the same command goes
on, because every stage does. A stage that fails leaves its section saying so, and the others go on. Stages are
joined by the files in their run folders, never by imports of what they computed.
"""

import argparse
import dataclasses
import fcntl
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

from pretrain.config import ConfigError
from pretrain.origin import origin
from pretrain.plots import COLORS, Curve, Level, Panel, draw
from pretrain.rundir import write_atomic, write_json_atomic
from pretrain.scaling import page
from research_env.dashboards.page import read_arms
from research_env.ledger import Ledger, ledger_path

ROOT = Path(__file__).parents[1]
# SIGTERM to the stage when this process ends, however it ends; stages save and leave on SIGTERM. The setting
# (prctl PR_SET_PDEATHSIG, Linux) survives exec, so a line of Python in front of the command is enough.
_LAUNCH = """import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 15)
os.execv(sys.executable, [sys.executable, "-m", *sys.argv[1:]])"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """One curve: the command that makes it, and how its folder becomes a section of the page."""

    key: str
    title: str
    question: str
    module: str
    config: str
    workdir_key: str  # the config's field that says where the run writes
    results: str  # below the workdir; {name} is the config's
    section: Callable[[Path], list[str]]

    def command(self, workdir: Path) -> list[str]:
        """What one would type behind `python -m`."""
        return [self.module, "--config", self.config, f"{self.workdir_key}={workdir / self.key}"]

    def folder(self, workdir: Path) -> Path:
        """Where its results lie."""
        return workdir / self.key / self.results.format(name=Path(self.config).stem)


# --- sections ------------------------------------------------------------------------------------------


def markdown_parts(text: str) -> list[str]:
    """Headings, lists, tables and paragraphs of the Markdown that our own pages use, as HTML."""
    parts: list[str] = []
    for block in re.split(r"\n\s*\n", text.strip()):
        lines = block.strip().splitlines()
        while lines and lines[0].startswith("#"):
            marks, _, title = lines.pop(0).partition(" ")
            parts.append(page.heading(title, min(6, len(marks) + 2)))
        if not lines:
            continue
        if all(line.startswith("|") for line in lines) and len(lines) > 1:
            rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines]
            parts.append(page.table(rows[0], rows[2:]))
        elif all(line.startswith(("- ", "  ")) for line in lines):
            parts += [page.paragraph(line.strip().removeprefix("- ")) for line in lines]
        else:
            parts.append(page.paragraph(" ".join(lines)))
    return parts


def arms_section(folder: Path) -> list[str]:
    """Pages of synth: its picture and its tables."""
    text = (folder / "results.md").read_text()
    picture = page.figure((folder / "results.png").read_bytes(), f"The curves of {folder.name}")
    return [picture, *markdown_parts(text)]


def research_section(folder: Path) -> list[str]:
    """A campaign: best so far against experiments, the arms, what was promoted."""
    summary = json.loads((folder / "summary.json").read_text())
    path = ledger_path(folder)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there")
    ledger = Ledger(path)
    arms = read_arms(ledger)
    ledger.close()
    curves = []
    for index, (arm, told) in enumerate(arms.items()):
        best, values = None, []
        for _, result in told:
            best = result.metric if result.better_than(best) else best
            values.append(float("nan") if best is None else best)
        curves.append(
            Curve(
                label=arm,
                x=list(range(1, len(values) + 1)),
                y=values,
                color=COLORS[index % len(COLORS)],
                width=1.8,
            )
        )
    panel = Panel(
        title="Best so far",
        x_label="experiments",
        y_label=str(summary["metric"]),
        curves=curves,
        levels=[Level(label="baseline", y=summary["baseline"])],
    )
    header = [key for key in summary["arms"][0] if key != "stopped"]
    rows = [[_short(arm[key]) for key in header] for arm in summary["arms"]]
    winner = summary["winner"]
    said = (
        "Nothing was promoted: no candidate beat the baseline on fresh paired seeds."
        if winner is None
        else f"Promoted: {winner['idea']}, gain {winner['mean']:.4f} [{winner['lower']:.4f}, {winner['upper']:.4f}] on "
        f"{winner['num_seeds']} fresh paired seeds."
    )
    facts = f"Baseline {summary['metric']} {summary['baseline']:.4f}, noise {summary['sigma0']:.4f}."
    return [
        page.figure(draw([panel]), "Best metric so far against experiments"),
        page.paragraph(said),
        page.paragraph(facts),
        page.table(header, rows),
    ]


def ladder_section(folder: Path) -> list[str]:
    """A ladder: the body of its own page."""
    text = (folder / "report.html").read_text()
    body = text.partition("</h1>")[2].rpartition("</body>")[0]
    return [body.replace("<h2>", "<h3>").replace("</h2>", "</h3>")]


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "none" if value is None else str(value)


STAGES = (
    Stage(
        key="entigraph",
        title="Accuracy against synthetic tokens",
        question="Does text that a model makes of a few documents teach what the documents alone do not?",
        module="synth.main",
        config="configs/synth/entigraph_worlds.py",
        workdir_key="run.workdir",
        results="",
        section=arms_section,
    ),
    Stage(
        key="sbp",
        title="Loss against data, with and without bootstrapping",
        question="Does text made from pairs of related documents help where the data are used up?",
        module="synth.main",
        config="configs/synth/sbp_worlds.py",
        workdir_key="run.workdir",
        results="",
        section=arms_section,
    ),
    Stage(
        key="research",
        title="Best idea against experiments",
        question="Does search over ideas that are run and scored find more than independent ideas?",
        module="research_env.main",
        config="configs/research_env/quickstart.py",
        workdir_key="workdir",
        results="",
        section=research_section,
    ),
    Stage(
        key="ladder",
        title="Loss against compute",
        question="Does a law fitted to small runs predict one of four times their largest budget?",
        module="pretrain.scaling",
        config="configs/scaling/ladder_cpu.py",
        workdir_key="train.run.workdir",
        results="{name}",
        section=ladder_section,
    ),
)


# --- running -------------------------------------------------------------------------------------------


def run_stage(stage: Stage, workdir: Path, say: Callable[[str], None] = print) -> int:
    """Run a stage's command to its end, its lines shown and kept; returns its exit code.

    What a killed run left behind is waited for: a stage in the middle of a compile hears SIGTERM late.
    """
    command = stage.command(workdir)
    record_path = workdir / f"{stage.key}.json"
    record = json.loads(record_path.read_text()) if record_path.exists() else {"seconds": 0.0}
    with (
        open(workdir / f"{stage.key}.lock", "ab") as lock,
        open(workdir / f"{stage.key}.log", "ab") as log,
    ):
        _take(lock, say)
        began = time.monotonic()
        with subprocess.Popen(
            [sys.executable, *(("-c", _LAUNCH) if sys.platform == "linux" else ("-m",)), *command],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=(lock.fileno(),),  # held until the stage ends, however we end
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                log.write(line)
                log.flush()
                say(f"  {line.decode(errors='replace').rstrip()}")
    seconds = record["seconds"] + time.monotonic() - began
    write_json_atomic(
        record_path,
        {
            "command": " ".join(command),
            "seconds": seconds,
            "exit_code": process.returncode,
            "origin": origin(),
        },
    )
    return process.returncode


def _take(lock: IO[bytes], say: Callable[[str], None]) -> None:
    """Hold the file's lock, after whoever holds it now."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        say("  waiting for a process that is still in this stage: one at a time")
        fcntl.flock(lock, fcntl.LOCK_EX)


# --- the page ------------------------------------------------------------------------------------------


def write_page(stages: Sequence[Stage], workdir: Path) -> tuple[Path, list[str]]:
    """Write `<workdir>/index.html`; returns it with the keys of stages that have no results."""
    absent: list[str] = []
    sections: list[str] = []
    rows: list[tuple[str, ...]] = []
    for stage in stages:
        record_path = workdir / f"{stage.key}.json"
        record = json.loads(record_path.read_text()) if record_path.exists() else None
        sections += [page.heading(stage.title), page.paragraph(stage.question, "note")]
        try:
            body = stage.section(stage.folder(workdir))
            state = (
                "finished"
                if record is None or record["exit_code"] == 0
                else f"exit code {record['exit_code']}"
            )
        except (OSError, KeyError, ValueError) as error:
            absent.append(stage.key)
            body = [page.paragraph(f"No results: {type(error).__name__}: {error}", "doubt")]
            state = "no results"
        sections += body
        sections.append(
            page.paragraph(f"Every number of this section is from {stage.folder(workdir)}.", "note")
        )
        sections.append(page.code("python -m " + " ".join(stage.command(workdir))))
        facts = record["origin"] if record else {}
        rows.append(
            (
                stage.key,
                state,
                f"{record['seconds'] / 60:.1f}" if record else "not recorded",
                stage.config,
                facts.get("commit", "not recorded"),
                facts.get("hardware", "not recorded"),
            )
        )
    head = [
        page.paragraph(
            "Models that keep teaching themselves: three curves, and the law of the trainer under them."
        ),
        page.table(("stage", "state", "minutes", "config", "commit", "hardware"), rows),
    ]
    path = workdir / "index.html"
    write_atomic(path, page.page("autodidact: the thesis on one machine", [*head, *sections]))
    return path, absent


def main(argv: Sequence[str], stages: Sequence[Stage] = STAGES) -> int:
    """The return value is the process' exit code (2: bad input, 1: a stage failed or has no results)."""
    parser = argparse.ArgumentParser(prog="python -m tools.thesis", description=__doc__.split("\n\n")[0])
    parser.add_argument("--workdir", type=Path, default=Path("runs/thesis"))
    parser.add_argument("--only", nargs="+", default=[stage.key for stage in stages])
    parser.add_argument("--report", action="store_true", help="only write the page, from what is there")
    arguments = parser.parse_args(argv)
    workdir = arguments.workdir.absolute()
    try:
        unknown = sorted(set(arguments.only) - {stage.key for stage in stages})
        if unknown:
            known = ", ".join(stage.key for stage in stages)
            raise ConfigError(f"--only must name stages ({known}), got {', '.join(unknown)}")
        workdir.mkdir(parents=True, exist_ok=True)
        chosen = [stage for stage in stages if stage.key in arguments.only]
        failed = []
        for number, stage in enumerate([] if arguments.report else chosen, 1):
            if not (ROOT / stage.config).is_file():
                failed.append(stage.key)
                print(f"[{number}/{len(chosen)}] {stage.title}: {stage.config} is not there", flush=True)
                continue
            print(f"[{number}/{len(chosen)}] {stage.title}", flush=True)
            if run_stage(stage, workdir, lambda line: print(line, flush=True)):
                failed.append(stage.key)
                print(
                    f"[{number}/{len(chosen)}] {stage.title}: failed, see {workdir / stage.key}.log",
                    flush=True,
                )
        path, absent = write_page(stages, workdir)
        print(f"the page: {path}" + (f"; without results: {', '.join(absent)}" if absent else ""))
        return 1 if failed or set(absent) & {stage.key for stage in chosen} else 0
    except ConfigError as error:
        for fault in error.faults:
            print(f"error: {fault}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
