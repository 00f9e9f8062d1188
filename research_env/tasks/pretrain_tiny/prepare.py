"""This repository's own trainer as the codebase, and the reference text that comes with Python as its data."""

import hashlib
import pydoc_data.topics
import shutil
from pathlib import Path

from pretrain import config

ROW_BYTES, NUM_ROWS = 65, 512


def prepare(folder: Path) -> None:
    """Copy pretrain/, write data/train.bin (for runs) and locked/validation.bin (for the judge), ASCII bytes."""
    source = Path(config.__file__).parent
    shutil.copytree(source, folder / "pretrain", ignore=shutil.ignore_patterns("__pycache__", ".*"))
    parts = {"train": b"", "validation": b""}
    for name, text in sorted(pydoc_data.topics.topics.items()):
        held_out = hashlib.sha256(name.encode()).digest()[0] < 32
        parts["validation" if held_out else "train"] += text.encode("ascii", "ignore") + b"\n\n"
    (folder / "data").mkdir()
    (folder / "data" / "train.bin").write_bytes(parts["train"])
    (folder / "locked" / "validation.bin").write_bytes(parts["validation"][: ROW_BYTES * NUM_ROWS])
