"""`python -m synth.main --config FILE key=value ...`: run the pipeline or the experiment that a config describes."""

import sys
from collections.abc import Sequence

from pretrain.config import ConfigError, apply_overrides, load_config, parse_argv
from pretrain.jobs.api import JobsFailed
from synth.stage import StageFailed

EXIT_BAD_INPUT = 2
EXIT_FAILED_ITEMS = 6
EXIT_STOPPED_BY_BUDGET = 75


def main(argv: Sequence[str]) -> int:
    """Run one job; the return value is the exit code.

    0 done, 2 bad input, 6 too many items or a job failed, or a base its gate, 75 stopped by the budget (a larger one goes on from there).
    """
    try:
        path, overrides = parse_argv(argv)
        config = apply_overrides(load_config(path), overrides)
        if not hasattr(config, "execute"):
            raise ConfigError(f"{path} must return a config of synth, got {type(config).__name__}")
        results = config.execute(lambda line: print(line, flush=True))
        return EXIT_STOPPED_BY_BUDGET if any(result.partial for result in results) else 0
    except ConfigError as error:
        for fault in error.faults:
            print(f"error: {fault}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except (StageFailed, JobsFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_FAILED_ITEMS


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
