"""Check checkpoints without any model code: `python -m tools.verify_checkpoint FOLDER ...`, nothing is changed.

FOLDER is a run folder, its `checkpoints/`, or one step. Exit code 0: all steps keep their promises, 2: this machine
cannot read one, so nothing is said about it, 3: there is no checkpoint, 4: one is damaged.
"""

import argparse
import sys
import time
from pathlib import Path

from pretrain.checkpoint import MANIFEST, Damaged, Unreadable, saved_steps, verify


def main(argv: list[str]) -> int:
    """Print one line per step; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.verify_checkpoint", description=__doc__)
    parser.add_argument("folder", type=Path, nargs="+", help="a run folder, a checkpoint folder or one step")
    code = 0
    for folder in parser.parse_args(argv).folder:
        try:
            steps = step_folders(folder)
        except Unreadable as error:
            print(f"error: {error}", file=sys.stderr)
            code = max(code, 2)
            continue
        if not steps:
            print(
                f"error: a checkpoint has a {MANIFEST}, and none lies in {folder}; name another folder",
                file=sys.stderr,
            )
            code = max(code, 3)
        for path in steps:
            began = time.perf_counter()
            try:
                leaves = verify(path)
                print(f"step {path.name}: ok, {len(leaves)} leaves, {time.perf_counter() - began:.2f} s")
            except Damaged as error:
                print(f"step {path.name}: damaged: {error}")
                code = 4
            except Unreadable as error:
                print(f"step {path.name}: not read: {error}")
                code = max(code, 2)
    return code


def step_folders(folder: Path) -> list[Path]:
    """The step folders that `folder` means, oldest first."""
    if (folder / MANIFEST).exists():
        return [folder]
    for place in (folder, folder / "checkpoints"):
        if steps := saved_steps(place):
            return [place / str(step) for step in steps]
    return []


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
