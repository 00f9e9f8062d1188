"""Sums of two numbers below 100, split by a fixed seed: some solved, many to learn from, the rest held out.

Answers are written from their last digit, in the order of carrying, which a small model can learn. A run could make up the
held-out sums, since it can add: no lock prevents that where problems are this simple, a look at the promoted diff does.
"""

import random
import shutil
from pathlib import Path

NUM_SOLVED, NUM_HELDOUT = 3000, 500


def prepare(folder: Path) -> None:
    """Write data/solved.txt and data/train.txt (for runs), locked/heldout.txt and a copy of the model (for the judge)."""
    sums = [(f"{a:02}+{b:02}=", f"{a + b:03}"[::-1]) for a in range(100) for b in range(100)]
    random.Random(0).shuffle(sums)
    parts = {
        "data/solved.txt": sums[:NUM_SOLVED],
        "data/train.txt": sums[NUM_SOLVED:-NUM_HELDOUT],
        "locked/heldout.txt": sums[-NUM_HELDOUT:],
    }
    (folder / "data").mkdir()
    for name, pairs in parts.items():
        (folder / name).write_text("".join(f"{prompt} {reply}\n" for prompt, reply in pairs))
    for name in ("model.py", "weights.py"):
        shutil.copyfile(folder / name, folder / "locked" / name)
