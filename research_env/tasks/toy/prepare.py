"""The text of the toy task: Python's reference topics, in parts for runs, for the judge, and for the judge of the final score."""

from pathlib import Path

from research_env.tasks.toy.reference_text import read_parts

ROW_BYTES, NUM_ROWS = 129, 160


def prepare(folder: Path) -> None:
    """Write data/train.bin (for runs), locked/validation.bin and final/test.bin (for the judge), ASCII bytes."""
    parts = read_parts()
    (folder / "data").mkdir()
    (folder / "data" / "train.bin").write_bytes(parts["train"])
    (folder / "locked" / "validation.bin").write_bytes(parts["validation"][: ROW_BYTES * NUM_ROWS])
    (folder / "final").mkdir()
    (folder / "final" / "test.bin").write_bytes(parts["validation"][ROW_BYTES * NUM_ROWS :])
