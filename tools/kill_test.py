"""Kill a training run again and again; it must end with the very parameters of the run that was left alone.

    python -m tools.kill_test --config configs/pretrain/smoke.py --kills 25 run.num_steps=60

Each start of `python -m pretrain.main` gets SIGKILL at a seeded random moment inside a chosen phase: startup
(data, restore, compilation), steps, evaluation, checkpoint writing. Then the same command runs again. A run that
ends before its kills are used up is compared and another one begins. Prints a table, writes `kill_test.json`
into the work folder; exit code 1 when anything differs or a start fails by itself.
"""

import argparse
import collections
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from pretrain.checkpoint import saved_steps
from pretrain.config import ConfigError, apply_overrides, fingerprint, load_config
from pretrain.origin import origin
from pretrain.rundir import RunDir, write_json_atomic

PHASES: tuple[str, ...] = ("startup", "step", "evaluation", "checkpoint")
POLL_S = 0.002
LOG_EVERY_STEP = "run.log_every_steps=1"  # a local field: shows the phases without changing the run


def last_line(path: Path) -> dict[str, Any] | None:
    """The last finished metric line, None when there is none."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - (1 << 18)))
            lines = file.read().split(b"\n")[:-1]
    except FileNotFoundError:
        return None
    return json.loads(lines[-1]) if lines else None


def unfinished_checkpoints(run: RunDir) -> set[tuple[str, int]]:
    """Name and inode of each step folder that is being written or was when its process died."""
    if not run.checkpoints.is_dir():
        return set()
    finished = {str(step) for step in saved_steps(run.checkpoints)}
    entries = [(entry.name, entry.inode()) for entry in os.scandir(run.checkpoints)]
    return {
        (name, inode)
        for name, inode in entries
        if "orbax-checkpoint-tmp" in name or (name.isdigit() and name not in finished)
    }


def phase_on_disk(
    run: RunDir, *, eval_every_steps: int | None, last_step: int, leftovers: set[tuple[str, int]]
) -> str:
    """What a run that has begun its steps is doing, told by its folder alone."""
    if unfinished_checkpoints(run) - leftovers:
        return "checkpoint"
    line = last_line(run.metrics_jsonl)
    if line is not None and line["kind"] == "train":
        step = line["step"]
        if step == last_step or (eval_every_steps is not None and step % eval_every_steps == 0):
            return "evaluation"
    return "step"


class Watcher:
    """Follows one start of a run. It has begun its steps when a line was appended to its metrics."""

    def __init__(self, run: RunDir, *, eval_every_steps: int | None, last_step: int):
        self._run, self._eval_every_steps, self._last_step = run, eval_every_steps, last_step
        self._leftovers = unfinished_checkpoints(run)
        self._file = self._state()
        self._begun = False

    def _state(self) -> tuple[int, int] | None:
        try:
            stat = self._run.metrics_jsonl.stat()
        except FileNotFoundError:
            return None
        return stat.st_ino, stat.st_size

    def phase(self) -> str:
        """The phase now."""
        if not self._begun:
            # Resuming replaces the file, to drop lines after the checkpoint; steps append to it.
            before, now = self._file, self._state()
            if now is not None and now[1] > 0:
                self._begun = before is None or (before[0] == now[0] and before[1] < now[1])
            self._file = now
        if not self._begun:
            return "startup"
        return phase_on_disk(
            self._run,
            eval_every_steps=self._eval_every_steps,
            last_step=self._last_step,
            leftovers=self._leftovers,
        )


class Harness:
    """One configuration, killed in work folders below `root`."""

    def __init__(self, config_path: str, overrides: list[str], root: Path, rng: random.Random):
        self._command = [
            sys.executable,
            "-m",
            "pretrain.main",
            "--config",
            config_path,
            *overrides,
            LOG_EVERY_STEP,
        ]
        self._root, self._rng = root, rng
        self._name = Path(config_path).stem
        self._config = apply_overrides(load_config(config_path), overrides)
        self.durations_s: dict[str, float] = {}

    def run_dir(self, workdir: str) -> RunDir:
        """Where the run of this configuration lies below a work folder."""
        return RunDir(self._root / workdir / self._name / fingerprint(self._config)[:8])

    def _start(self, workdir: str) -> tuple[subprocess.Popen[bytes], Watcher]:
        self._root.mkdir(parents=True, exist_ok=True)
        run = self._config.run
        watcher = Watcher(
            self.run_dir(workdir), eval_every_steps=run.eval_every_steps, last_step=run.last_step
        )
        with open(self._root / f"{workdir}.log", "ab") as log:
            command = [*self._command, f"run.workdir={self._root / workdir}"]
            return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT), watcher

    def reference(self) -> None:
        """The uninterrupted run; measures how long each phase takes."""
        child, watcher = self._start("reference")
        spent = dict.fromkeys(PHASES, 0.0)
        entered: collections.Counter[str] = collections.Counter()
        phase, since = "startup", time.monotonic()
        entered[phase] = 1
        while child.poll() is None:
            time.sleep(POLL_S)
            now, current = time.monotonic(), watcher.phase()
            spent[phase] += now - since
            entered[current] += current != phase
            phase, since = current, now
        if child.returncode:
            raise RuntimeError(
                f"the uninterrupted run failed with code {child.returncode}: {self.tail('reference')}"
            )
        self.durations_s = {name: spent[name] / max(entered[name], 1) for name in PHASES}
        self.durations_s["steps"] = spent["step"]

    def tail(self, workdir: str) -> str:
        """The last lines that the starts in a work folder printed."""
        return (self._root / f"{workdir}.log").read_text(errors="replace")[-2000:]

    def start_and_kill(self, workdir: str, target: str) -> dict[str, Any] | None:
        """One start, killed in phase `target` when it gets there; None when it ended before.

        Raises:
          RuntimeError: it failed by itself.
        """
        began = time.monotonic()
        child, watcher = self._start(workdir)
        # Stay a random part of the phase's length in it; steps come back, so any later step will do as well.
        length_s = self.durations_s["steps"] * 0.3 if target == "step" else self.durations_s[target]
        wait_s = self._rng.uniform(0.0, length_s)
        phase = "startup"
        reached = began if target == "startup" else None
        while child.poll() is None:
            now = time.monotonic()
            if reached is None and watcher.phase() == target:
                reached = now
            if reached is not None and now - reached >= wait_s:
                phase = watcher.phase()
                child.kill()
                child.wait()
                break
            time.sleep(POLL_S)
        if child.returncode == 0:
            return None
        if child.returncode != -9:
            raise RuntimeError(f"a start ended by itself with code {child.returncode}: {self.tail(workdir)}")
        run = self.run_dir(workdir)
        line = last_line(run.metrics_jsonl)
        return {
            "workdir": workdir,
            "target": target,
            "phase": phase,
            "after_s": round(time.monotonic() - began, 3),
            "last_step": None if line is None else line["step"],
            "newest_checkpoint": max(saved_steps(run.checkpoints), default=None),
        }

    def finish(self, workdir: str) -> None:
        """One start that is left alone.

        Raises:
          RuntimeError: it failed.
        """
        child, _ = self._start(workdir)
        if child.wait():
            raise RuntimeError(f"the last start failed with code {child.returncode}: {self.tail(workdir)}")

    def compare(self, workdir: str) -> dict[str, Any]:
        """The end of an interrupted run beside that of the uninterrupted one."""
        ends = []
        for folder in ("reference", workdir):
            run = self.run_dir(folder)
            summary = json.loads(run.summary_json.read_text())
            lines = [json.loads(line) for line in run.metrics_jsonl.read_text().splitlines()]
            losses = [(line["step"], line["loss"]) for line in lines if line["kind"] == "train"]
            ends.append((summary, losses, sorted(p.name for p in run.checkpoints.glob("*.bad*"))))
        (expected, expected_losses, _), (got, losses, bad) = ends
        return {
            "workdir": workdir,
            "params_sha256": got["params_sha256"],
            "same_params": got["params_sha256"] == expected["params_sha256"],
            "same_losses": losses == expected_losses,
            "same_val_bits_per_byte": got["val_bits_per_byte"] == expected["val_bits_per_byte"],
            "quarantined": bad,
        }


def run_kills(harness: Harness, num_kills: int, rng: random.Random) -> tuple[list[dict], list[dict]]:
    """The kills, and the ends of the runs they hit."""
    kills: list[dict] = []
    ends: list[dict] = []
    targets: list[str] = []
    while len(kills) < num_kills:
        workdir = f"killed{len(ends)}"
        kill: dict | None = {}
        while kill is not None and len(kills) < num_kills:
            targets = targets or rng.sample(PHASES, len(PHASES))
            kill = harness.start_and_kill(workdir, targets.pop())
            if kill is not None:
                kills.append(kill)
                print(
                    f"kill {len(kills):3}  {kill['phase']:<10} after {kill['after_s']:6.2f} s"
                    f"  step {kill['last_step']}  checkpoint {kill['newest_checkpoint']}",
                    flush=True,
                )
        if kill is not None:
            harness.finish(workdir)
        ends.append(harness.compare(workdir))
    return kills, ends


def main(argv: list[str]) -> int:
    """Run the test; the return value is the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.kill_test",
        description="Kill a training run again and again and compare its end.",
    )
    parser.add_argument("--config", required=True)
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workdir", type=Path, help="default: a temporary folder, removed at the end")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_intermixed_args(argv)
    with tempfile.TemporaryDirectory(prefix="kill_test_") as temporary:
        root = (arguments.workdir or Path(temporary)).absolute()
        rng = random.Random(arguments.seed)
        try:
            harness = Harness(arguments.config, arguments.overrides, root, rng)
        except ConfigError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        return report(harness, arguments.kills, arguments.seed, root, rng)


def report(harness: Harness, num_kills: int, seed: int, root: Path, rng: random.Random) -> int:
    """Run everything below `root`, print the tables, write the JSON."""
    try:
        harness.reference()
        kills, ends = run_kills(harness, num_kills, rng)
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    phases = collections.Counter(kill["phase"] for kill in kills)
    differences = sum(
        not (e["same_params"] and e["same_losses"] and e["same_val_bits_per_byte"]) for e in ends
    )
    quarantined = sum(len(end["quarantined"]) for end in ends)
    print("\nphase        kills   seconds in it, uninterrupted")
    for name in PHASES:
        print(f"{name:<10} {phases[name]:>7}   {harness.durations_s[name]:.2f}")
    print("\nrun          parameters                                    losses  bits per byte")
    for end in ends:
        same = [
            "same" if end[key] else "DIFFER"
            for key in ("same_params", "same_losses", "same_val_bits_per_byte")
        ]
        print(f"{end['workdir']:<12} {same[0]:<6} {end['params_sha256'][:36]}   {same[1]:<6}  {same[2]}")
    print(
        f"\n{len(kills)} kills, {len(ends)} runs, {differences} differences, {quarantined} damaged checkpoints"
    )
    write_json_atomic(
        root / "kill_test.json",
        {
            "origin": origin(),
            "seed": seed,
            "phases": dict(phases),
            "durations_s": harness.durations_s,
            "kills": kills,
            "runs": ends,
            "differences": differences,
            "damaged_checkpoints": quarantined,
        },
    )
    return 1 if differences or quarantined else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
