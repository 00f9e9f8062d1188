"""What can this host isolate? `python -m research_env.doctor` attempts what must be impossible, level by level."""

import statistics
import sys

from rich.console import Console
from rich.table import Table

from research_env.sandbox.ladder import Isolation, measure_kill_s, measure_launch_s, probe
from research_env.sandbox.run import LEVELS


def main() -> int:
    """Print a table of attempted acts; exit code 0 when some level holds them all, else 1."""
    found = [probe(level) for level in LEVELS[:-1]]
    console = Console()
    console.print(_table(found))
    for isolation in found:
        if not isolation.is_held:
            failed = "; ".join(f"{c.name}: {c.detail}" for c in isolation.checks if not c.is_held)
            console.print(f"{isolation.level} does not hold here: {failed}", markup=False, highlight=False)
    held = [isolation for isolation in found if isolation.is_held]
    hierarchies = found[0].hierarchies
    console.print(
        f"memory limit: {'control group' if hierarchies.has_memory else 'polled'} · "
        f"process limit: {'control group' if hierarchies.has_pids else 'polled'} · "
        f"atomic kill: {'yes' if hierarchies.v2 else 'no'}"
    )
    if not held:
        console.print("no level holds; candidates would run only with sandbox.level=none, by name")
        return 1
    plain_ms = 1000 * statistics.median(measure_launch_s("none"))
    for isolation in held:
        seconds = sorted(measure_launch_s(isolation.level))
        kill_ms = 1000 * max(measure_kill_s(isolation.level) for _ in range(3))
        console.print(
            f"{isolation.level}: an empty job costs {1000 * statistics.median(seconds) - plain_ms:.0f} ms more than a plain "
            f"process (median of {len(seconds)}; 95th percentile {1000 * seconds[int(0.95 * len(seconds))] - plain_ms:.0f} ms); "
            f"a tree of 50 processes is gone {kill_ms:.0f} ms after the kill"
        )
    console.print(f"sandbox.level=auto takes: {held[0].label}")
    return 0


def _table(found: list[Isolation]) -> Table:
    table = Table(title="acts that must be impossible")
    table.add_column("act")
    for isolation in found:
        table.add_column(isolation.level)
    names = list(dict.fromkeys(check.name for isolation in found for check in isolation.checks))
    for name in names:
        row = [name]
        for isolation in found:
            check = next((c for c in isolation.checks if c.name == name), None)
            row.append(
                "" if check is None else ("held" if check.is_held else "NOT HELD") + f" ({check.detail[:48]})"
            )
        table.add_row(*row)
    return table


if __name__ == "__main__":
    sys.exit(main())
