"""What a jail costs and how fast a tree dies, level by level: `python -m tools.bench_sandbox [runs=30] [out=FILE]`.

Overhead is the median of empty jobs, from nothing to nothing, less the median of the same job as a plain process; the levels
take turns, so that a host that slows down slows them all. A kill is timed from the order to the empty control group.
"""

import json
import os
import platform
import statistics
import sys
from pathlib import Path

from research_env.sandbox.ladder import measure_kill_s, measure_launch_s, probe

LEVELS = ("bwrap", "unshare", "landlock")


def main(argv: list[str]) -> int:
    """Print a table; exit code 2 for bad arguments."""
    options = {"runs": "30", "out": ""}
    for word in argv:
        key, _, value = word.partition("=")
        if key not in options or (key == "runs" and not value.isdigit()):
            print(f"error: arguments are runs=N and out=FILE, got {word!r}", file=sys.stderr)
            return 2
        options[key] = value
    levels = [level for level in LEVELS if probe(level).is_held]
    seconds: dict[str, list[float]] = {level: [] for level in ("none", *levels)}
    for _ in range(int(options["runs"])):
        for level in seconds:
            seconds[level] += measure_launch_s(level, num_runs=1)
    kills = {level: [measure_kill_s(level) for _ in range(10)] for level in levels}
    plain_ms = 1000 * statistics.median(seconds["none"])
    report = {
        "host": f"{platform.machine()}, {os.cpu_count()} cores, kernel {platform.release()}",
        "load": os.getloadavg()[0],
        "runs": int(options["runs"]),
        "plain_ms": plain_ms,
        "overhead_ms": {level: 1000 * statistics.median(seconds[level]) - plain_ms for level in levels},
        "overhead_least_ms": {level: 1000 * (min(seconds[level]) - min(seconds["none"])) for level in levels},
        "kill_50_ms": {level: 1000 * statistics.median(kills[level]) for level in levels},
        "kill_50_worst_ms": {level: 1000 * max(kills[level]) for level in levels},
    }
    print(json.dumps(report, indent=1))
    if options["out"]:
        Path(options["out"]).write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
