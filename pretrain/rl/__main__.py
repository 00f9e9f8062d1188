"""`python -m pretrain.rl --config FILE key=value ...`: a study of what a reward teaches, its table and its picture."""

import sys
from collections.abc import Sequence
from pathlib import Path

from pretrain.config import ConfigError, apply_overrides, load_config, parse_argv
from pretrain.jobs.api import JobsFailed
from pretrain.rl.study import StudyConfig, run_study, table, write_report


def main(argv: Sequence[str]) -> int:
    """Run a study; the return value is the process' exit code (2: bad input, 1: models failed)."""
    try:
        path, overrides = parse_argv(argv)
        config = apply_overrides(load_config(path), overrides)
        if not isinstance(config, StudyConfig):
            raise ConfigError(
                f"{path} must return a StudyConfig for pretrain.rl, got {type(config).__name__}"
            )
        name = Path(path).stem
        arms = run_study(config, name, lambda line: print(line, flush=True))
        print(table(arms))
        for kind, written in write_report(arms, Path(config.workdir) / name, name).items():
            print(f"{kind}: {written}")
        return 0
    except ConfigError as error:
        for fault in error.faults:
            print(f"error: {fault}", file=sys.stderr)
        return 2
    except JobsFailed as error:
        print(f"error: {error}; the same command runs what is missing", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
