"""The text of the toy task: the reference topics that come with Python, split by topic into train and validation."""

import hashlib
import pydoc_data.topics
from pathlib import Path


def prepare(folder: Path) -> None:
    """Write data/train.bin (for runs), locked/validation.bin and final/test.bin (for the judge), ASCII bytes."""
    parts = {"train": b"", "validation": b""}
    for name, text in sorted(pydoc_data.topics.topics.items()):
        held_out = hashlib.sha256(name.encode()).digest()[0] < 32
        parts["validation" if held_out else "train"] += text.encode("ascii", "ignore") + b"\n\n"
    (folder / "data").mkdir()
    (folder / "data" / "train.bin").write_bytes(parts["train"])
    (folder / "locked" / "validation.bin").write_bytes(parts["validation"][: 129 * 160])
    (folder / "final").mkdir()
    (folder / "final" / "test.bin").write_bytes(parts["validation"][129 * 160 :])
