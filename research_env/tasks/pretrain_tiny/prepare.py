"""This repository's own trainer as the codebase, and the reference text that comes with Python as its data."""

import shutil
from pathlib import Path

from pretrain import config
from research_env.tasks.toy.reference_text import read_parts

ROW_BYTES, NUM_ROWS = 65, 512


def prepare(folder: Path) -> None:
    """Copy pretrain/, write data/train.bin (for runs), locked/validation.bin and final/test.bin (for the judge), ASCII bytes."""
    source = Path(config.__file__).parent
    shutil.copytree(source, folder / "pretrain", ignore=shutil.ignore_patterns("__pycache__", ".*"))
    parts = read_parts()
    (folder / "data").mkdir()
    (folder / "data" / "train.bin").write_bytes(parts["train"])
    (folder / "locked" / "validation.bin").write_bytes(parts["validation"][: ROW_BYTES * NUM_ROWS])
    (folder / "final").mkdir()
    (folder / "final" / "test.bin").write_bytes(parts["test"])
