"""`python -m pretrain.main --config FILE key=value ...`: train the model that a config describes."""

import sys
from collections.abc import Sequence
from pathlib import Path

from pretrain.allocator import keep_heap
from pretrain.checkpoint import AllCheckpointsBad, NoCheckpoint
from pretrain.config import ConfigError, apply_overrides, load_config, parse_argv
from pretrain.distributed import joined
from pretrain.health import TooManySkips
from pretrain.train import TrainConfig, train


def main(argv: Sequence[str]) -> int:
    """Run one training job; the return value is the process' exit code (2: bad input)."""
    keep_heap()
    try:
        path, overrides = parse_argv(argv)
        config = apply_overrides(load_config(path), overrides)
        if not isinstance(config, TrainConfig):
            raise ConfigError(
                f"{path} must return a TrainConfig for pretrain.main, got {type(config).__name__}"
            )
        with joined(config.distributed):
            try:
                return train(config, name=Path(path).stem).exit_code
            except TooManySkips as error:  # in all processes alike: they end together
                print(f"error: {error}", file=sys.stderr)
                return error.exit_code
    except ConfigError as error:
        for fault in error.faults:
            print(f"error: {fault}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        # The loop saves and returns; this is before its first step, when files are whole or not there.
        print("stopped before the first step; the same command begins again", file=sys.stderr)
        return 130
    except (NoCheckpoint, AllCheckpointsBad) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
