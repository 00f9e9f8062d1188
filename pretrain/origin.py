"""Where numbers come from: commit, machine and versions, kept beside the results they belong to."""

import importlib.metadata
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parents[1]


def origin() -> dict[str, Any]:
    """Commit (with a mark when files differ from it), processor, versions, time; unknown facts are "unknown"."""
    return {
        "commit": commit(_ROOT),
        "hardware": f"{os.cpu_count()} x {processor()}",
        "python": platform.python_version(),
        "jax": importlib.metadata.version("jax"),
        "time": time.strftime("%Y-%m-%d %H:%M", time.gmtime()) + " UTC",
    }


def commit(root: Path) -> str:
    """Short hash of the commit that `root` has checked out, "+" behind it when tracked files were changed."""
    if not (root / ".git").exists():
        return "unknown"
    try:
        head = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "--short=10", "HEAD"],
            capture_output=True,
            text=True,
            check=True,
        )
        changed = subprocess.run(
            ["git", "-C", str(root), "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def processor() -> str:
    """The model name as Linux tells it, else what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine() or "unknown"
