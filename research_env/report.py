"""`python -m research_env.report FOLDER`: rebuild a campaign's page from its ledger and summary."""

import json
import sys
from pathlib import Path

from pretrain.config import ConfigError
from research_env.dashboards.page import write_page
from research_env.ledger import Ledger, ledger_path
from research_env.task import built_in_tasks, open_task, read_task


def main(argv: list[str]) -> int:
    """Write index.html beside the ledger; exit code 2 for a folder without a finished campaign."""
    try:
        if len(argv) != 1 or not (Path(argv[0]) / "summary.json").is_file():
            raise ConfigError(
                "research_env.report takes the folder of a finished campaign (with its summary.json)"
            )
        folder = Path(argv[0])
        summary = json.loads((folder / "summary.json").read_text())
        task = (
            open_task(summary["task"], folder)
            if summary["task"] in built_in_tasks()
            else read_task(summary["folder"])
        )
        ledger = Ledger(ledger_path(folder))
        try:
            print(write_page(ledger, task, folder / "index.html", summary))
        finally:
            ledger.close()
        return 0
    except ConfigError as error:
        for fault in error.faults:
            print(f"error: {fault}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
