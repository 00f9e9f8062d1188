"""The points of the template: a noisy cubic, drawn once by a fixed seed, split into what runs and what the judge may read."""

import random
from pathlib import Path


def prepare(folder: Path) -> None:
    """Write data/points.csv and locked/points.csv."""
    rng = random.Random(0)
    (folder / "data").mkdir()
    for name in ("data", "locked"):
        xs = [rng.uniform(-1, 1) for _ in range(256)]
        lines = [f"{x},{x**3 - 0.5 * x + rng.gauss(0, 0.05)}\n" for x in xs]
        (folder / name / "points.csv").write_text("".join(lines))
