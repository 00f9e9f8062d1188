"""The paper's pre-training environment on this repository's trainer: `python -m research_env.tasks.pretrain_124m.build TARGET key=value`

GPT-2 small on one host of eight accelerators, at most 25 minutes of training (arXiv 2601.14525, section 2, nanoGPT). The tokens
are yours: flat uint16 files, of FineWeb in the paper. Unlike there the validation tokens are behind the lock, the loss is the
judge's, over 262,144 tokens, and a second file can be the final split.

Tested on CPU devices with a shrunk recipe; not run yet on the hardware it is meant for.
"""

import os
import shutil
import sys
from pathlib import Path

import numpy as np

from pretrain import config
from research_env.words import read_words, refuse

ROW = 1024
NUM_ROWS = 256  # a frame of logits is 206 MB a row, so that scoring more takes longer than training
OPTIONS = {"train": "", "validation": "", "final": "", "vocab": "50304"}
FILES = Path(__file__).parent / "files"
SHARED = Path(__file__).parent.parent / "pretrain_tiny" / "codebase"


def main(argv: list[str]) -> int:
    """Write the codebase; exit code 2 and one line for each fault, with nothing written."""
    words = read_words(argv, OPTIONS, "TARGET")
    options, faults = words.options, words.faults
    faults += [
        f"{name}= must be a file of uint16 tokens, got {options[name]!r}"
        for name in ("train", "validation", "final")
        if (options[name] or name != "final") and not Path(options[name]).is_file()
    ]
    given = [os.path.realpath(options[name]) for name in ("train", "validation", "final") if options[name]]
    if len(set(given)) < len(given):
        faults.append(
            "train=, validation= and final= must be different files, or the score is of what was trained on"
        )
    if not options["vocab"].isdecimal():
        faults.append(f"vocab= must be a whole number, got {options['vocab']!r}")
    if not faults:
        faults += _token_faults(options)
    if faults:
        return refuse(faults)
    (target,) = words.folders
    build(target, options)
    print(f"codebase={target} is ready; resource=8xH100 accelerators=... runs it")
    return 0


def _token_faults(options: dict[str, str]) -> list[str]:
    faults = []
    for name in ("train", "validation", "final"):
        if not options[name]:
            continue
        size = os.path.getsize(options[name])
        if size % 2:
            faults.append(f"{name}={options[name]} holds {size} bytes; uint16 tokens take two each")
            continue
        tokens = np.memmap(options[name], np.uint16, "r") if size else np.zeros(0, np.uint16)
        if len(tokens) < ROW + 1:
            faults.append(f"{name}={options[name]} holds {len(tokens)} tokens; a row takes {ROW + 1}")
        elif (largest := int(tokens.max())) >= int(options["vocab"]):
            faults.append(
                f"{name}={options[name]} holds token {largest}; vocab={options['vocab']} ends before it"
            )
    return faults


def build(target: Path, options: dict[str, str]) -> None:
    """The trainer and the recipe as the tree, training tokens in data/, the judge's in locked/ and final/."""
    shutil.copytree(FILES, target)
    for name in ("serve.py", "weights.py"):
        shutil.copyfile(SHARED / name, target / name)
    shutil.copytree(
        Path(config.__file__).parent, target / "pretrain", ignore=shutil.ignore_patterns("__pycache__", ".*")
    )
    for path in (target / "recipe.py", target / "locked" / "evaluate.py"):
        path.write_text(path.read_text().replace("VOCAB = 50304", f"VOCAB = {int(options['vocab'])}"))
    (target / "data").mkdir()
    shutil.copyfile(options["train"], target / "data" / "train.bin")
    for name, place in (("validation", "locked"), ("final", "final")):
        if options[name]:
            (target / place).mkdir(exist_ok=True)
            tokens = np.fromfile(options[name], np.uint16, count=NUM_ROWS * (ROW + 1))
            tokens.tofile(target / place / f"{'test' if name == 'final' else name}.bin")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
