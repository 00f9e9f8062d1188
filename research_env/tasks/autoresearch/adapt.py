"""An autoresearch-style repository as a codebase: `python -m research_env.tasks.autoresearch.adapt SOURCE TARGET key=value ...`

Such a repository has one training file that an agent rewrites, one preparation file that it must not touch, and a metric line
that the training file prints: the graded holds the pen. Here the validation tokens move behind the lock, the printed line
counts for nothing, and the judge scores the logits of the model that the training file's `load` brings back.

The training file has to do two things that printing a number does not need: leave its weights as *.safetensors or *.npz in
the folder $OUT, and define `load(folder)`, which returns a function from int32 tokens [B, T] to logits [B, T, V].
"""

import ast
import shutil
import sys
from pathlib import Path

from research_env.words import read_words, refuse

OPTIONS = {
    "train": "train.py",  # the file that may change
    "prepare": "prepare.py",  # the file that may not
    "validation": "",  # flat file of validation tokens, in SOURCE
    "dtype": "uint16",
    "vocab": "",
    "row": "256",  # tokens of a scored row
    "bytes": "",  # bytes of text that the validation tokens encode
    "data": "",  # folder in SOURCE with what runs may read
    "cpu_s": "300",
}
TASK = """\
name = {name!r}
description = "The training file {train} is improved within its compute budget; lower bits per byte on held-out text are better."
metric = "bits_per_byte"
metric_range = [0.0, 64.0]
editable = [{train!r}]
locked = [{prepare!r}]
artifact = ["*.safetensors", "*.npz"]
artifact_mb = 2048
servers = 2
serve_module = {module!r}

[limits]
cpu_s = {cpu_s}
wall_s = {wall_s}
memory_mb = 16384
disk_mb = 4096

[judge_limits]
wall_s = {wall_s}
memory_mb = 16384
"""
EVALUATE = '''\
"""Bits per byte on tokens that no run has seen, from the logits of the candidate's model in another process."""

import math
import os
import sys

import numpy as np

sys.path.insert(0, os.environ["JUDGE"])
import judge  # noqa: E402

ROW, VOCAB, NUM_BYTES = {row}, {vocab}, {bytes}


def evaluate():
    """Every row is scored from its own tokens alone; the rest of the file after the last whole row is left out."""
    tokens = np.fromfile("locked/validation.bin", np.{dtype}).astype(np.int32)
    rows = tokens[: len(tokens) // (ROW + 1) * (ROW + 1)].reshape(-1, ROW + 1)
    loss = judge.mean_loss(judge.open_servers(), rows, VOCAB, batch_rows=16, num_cuts=len(rows), tolerance=1e-3)
    return loss * len(tokens) / NUM_BYTES / math.log(2)


judge.main(evaluate)
'''


def main(argv: list[str]) -> int:
    """Write the codebase; exit code 2 and one line for each fault, with nothing written."""
    words = read_words(argv, OPTIONS, "SOURCE", "TARGET")
    faults = words.faults
    if len(words.folders) == 2:
        faults += _faults(words.folders[0], words.options)
    if faults:
        return refuse(faults)
    source, target = words.folders
    adapt(source, target, words.options)
    print(f"codebase={target} is ready; env.value('') scores the unchanged training file")
    return 0


def _faults(source: Path, options: dict[str, str]) -> list[str]:
    faults = [f"{name}={options[name]} must be a file in {source}" for name in ("train", "prepare", "validation")
              if not options[name] or not (source / options[name]).is_file()]  # fmt: skip
    faults += [f"{name}= must be a whole number, got {options[name]!r}" for name in ("vocab", "row", "bytes", "cpu_s")
               if not options[name].isdigit()]  # fmt: skip
    if options["dtype"] not in ("uint8", "uint16", "int32"):
        faults.append(f"dtype must be uint8, uint16 or int32, got {options['dtype']!r}")
    if options["data"] and not (source / options["data"]).is_dir():
        faults.append(f"data={options['data']} must be a folder in {source}")
    if (source / options["train"]).is_file():
        module = ast.parse((source / options["train"]).read_bytes())
        if not any(isinstance(node, ast.FunctionDef) and node.name == "load" for node in module.body):
            faults.append(
                f"{options['train']} must define load(folder) -> function from int32 tokens [B, T] to logits [B, T, V], and "
                "train only under `if __name__ == '__main__':`, so that the judge can question its model"
            )
    return faults


def adapt(source: Path, target: Path, options: dict[str, str]) -> None:
    """Copy what runs may see, lock the rest, write the four files that make a codebase."""
    validation, data = source / options["validation"], options["data"]

    def hidden(folder: str, names: list[str]) -> set[str]:
        inside = {name for name in names if Path(folder, name) == validation}
        inside |= {name for name in names if data and Path(folder, name) == source / data}
        return inside | {name for name in names if name in (".git", "__pycache__", ".venv")}

    shutil.copytree(source, target, ignore=hidden)
    if data:
        shutil.copytree(source / data, target / "data", ignore=hidden)
    (target / "locked").mkdir()
    shutil.copyfile(validation, target / "locked" / "validation.bin")
    (target / "run.sh").write_text(f'exec "$PYTHON" {options["train"]}\n')
    (target / "eval.sh").write_text('exec "$PYTHON" -I locked/evaluate.py\n')
    (target / "locked" / "evaluate.py").write_text(EVALUATE.format(**options))
    values = {
        **options,
        "name": target.name,
        "module": Path(options["train"]).stem,
        "wall_s": 6 * int(options["cpu_s"]),
    }
    (target / "task.toml").write_text(TASK.format(**values).replace("'", '"'))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
