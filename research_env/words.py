"""The words after a command that writes a codebase: folders, and options as NAME=VALUE."""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Words:
    """What was typed. `folders` are as many as were asked for, unless `faults` says otherwise; the last is to be written."""

    folders: tuple[Path, ...]
    options: dict[str, str]
    faults: list[str]  # to which the command adds its own


def read_words(argv: Sequence[str], defaults: Mapping[str, str], *folders: str) -> Words:
    """`folders` are the names of those that are needed; all but the last are read, the last must be new."""
    given = tuple(Path(word) for word in argv if "=" not in word)
    options = {**defaults, **dict(word.split("=", 1) for word in argv if "=" in word)}
    faults = [
        f"unknown option {key!r}; known are {', '.join(defaults)}" for key in options if key not in defaults
    ]
    if len(given) != len(folders):
        faults.append(f"needed are the folders {' '.join(folders)}, got {[str(path) for path in given]}")
    elif given[-1].exists():
        faults.append(f"{given[-1]} exists; name a new folder")
    return Words(given, options, faults)


def refuse(faults: Sequence[str]) -> int:
    """Print one line for each fault; the exit code of bad input."""
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    return 2
