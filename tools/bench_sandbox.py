"""What a jail costs and how fast a tree dies, level by level: `python -m tools.bench_sandbox [runs=30] [out=FILE]`.

Overhead is the median of empty jobs, from nothing to nothing, less the median of the same job as a plain process; the levels
take turns, so that a host that slows down slows them all. On a busy host read `cpu_ms`, the processor time that the harness and
the launcher use for an empty job: what the overhead is when nobody else wants the processor. A kill is timed from the order to the empty control group.
"""

import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

from research_env.sandbox.cgroup import find_hierarchies
from research_env.sandbox.ladder import measure_kill_s, measure_launch_s, probe, start_job

LEVELS = ("bwrap", "unshare", "landlock")


def launch_cpu_s(level: str) -> float:
    """Processor seconds of an empty job: this process, and all that ran in the job's control group."""
    start = time.process_time()
    job, scratch = start_job(level, ["/bin/true"], find_hierarchies())
    outcome = job.wait()
    scratch.remove()
    return time.process_time() - start + outcome.cpu_s


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
    cpu_ms = {
        level: 1000 * statistics.median(launch_cpu_s(level) for _ in range(int(options["runs"])))
        for level in seconds
    }
    plain_ms = 1000 * statistics.median(seconds["none"])
    report = {
        "host": f"{platform.machine()}, {os.cpu_count()} cores, kernel {platform.release()}",
        "load": os.getloadavg()[0],
        "runs": int(options["runs"]),
        "plain_ms": plain_ms,
        "overhead_ms": {level: 1000 * statistics.median(seconds[level]) - plain_ms for level in levels},
        "overhead_least_ms": {level: 1000 * (min(seconds[level]) - min(seconds["none"])) for level in levels},
        "cpu_ms": cpu_ms,
        "kill_50_ms": {level: 1000 * statistics.median(kills[level]) for level in levels},
        "kill_50_worst_ms": {level: 1000 * max(kills[level]) for level in levels},
    }
    print(json.dumps(report, indent=1))
    if options["out"]:
        Path(options["out"]).write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
