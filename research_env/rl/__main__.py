"""`python -m research_env.rl --config FILE key=value ...`: does what research found on a small model help a larger one?"""

import sys
from collections.abc import Sequence
from pathlib import Path

from pretrain.config import ConfigError, apply_overrides, load_config, parse_argv
from pretrain.jobs.api import JobsFailed
from research_env.rl.transfer import TransferConfig, transfer


def main(argv: Sequence[str]) -> int:
    """Replay a campaign's best change; the return value is the process' exit code (2: bad input, 1: cells failed)."""
    try:
        path, overrides = parse_argv(argv)
        config = apply_overrides(load_config(path), overrides)
        if not isinstance(config, TransferConfig):
            raise ConfigError(
                f"{path} must return a TransferConfig for research_env.rl, got {type(config).__name__}"
            )
        command = " ".join(["python -m research_env.rl --config", path, *overrides])
        transfer(config, Path(path).stem, command, lambda line: print(line, flush=True))
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
