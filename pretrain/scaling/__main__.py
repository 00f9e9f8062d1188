"""`python -m pretrain.scaling --config FILE scaling.action=plan|check|run|fit|report`: a ladder, its law, its page.

The action may also stand first: `python -m pretrain.scaling plan --config FILE`. Without one the whole ladder is run,
fitted and reported; `check` is the coordinate check, whether one learning rate serves all of its widths.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from pretrain.config import ConfigError, apply_overrides, load_config, parse_argv
from pretrain.jobs.api import JobsFailed
from pretrain.scaling.coordinates import check_ladder
from pretrain.scaling.plan import ScalingConfig, plan_cells
from pretrain.scaling.report import analyze, fit_text, plan_text, write_report
from pretrain.scaling.run import Tables, finished_cells, run_cells

ACTIONS = ("plan", "check", "run", "fit", "report")


def main(argv: Sequence[str]) -> int:
    """Do one action of a ladder; the return value is the process' exit code (2: bad input, 1: cells failed or rates do not transfer)."""
    try:
        config, name, command = _parse(argv)
        action, tables = config.scaling.action, Tables(config)
        planned = plan_cells(config, tables.vocab_size)
        if action == "plan":
            print(plan_text(planned, tables))
            return 0
        if action == "check":
            text, is_flat = check_ladder(config, name, tables.vocab_size)
            print(text)
            return 0 if is_flat else 1
        if action in ("run", "report"):
            for cell in planned:
                tables.of(cell.train)
            run_cells(config, name, planned, lambda line: print(line, flush=True))
        if action in ("fit", "report"):
            cells, missing = finished_cells(config, name, tables)
            analysis = analyze(cells, config.fit, num_missing=len(missing))
            print(fit_text(analysis))
            if action == "report":
                print(write_report(analysis, config, name, command))
        return 0
    except ConfigError as error:
        for fault in error.faults:
            print(f"error: {fault}", file=sys.stderr)
        return 2
    except JobsFailed as error:
        print(f"error: {error}; the same command runs what is missing", file=sys.stderr)
        return 1


def _parse(argv: Sequence[str]) -> tuple[ScalingConfig, str, str]:
    """The config, the ladder's name, the command as one would type it."""
    arguments = list(argv)
    if arguments and arguments[0] in ACTIONS:
        arguments.append(f"scaling.action={arguments.pop(0)}")
    path, overrides = parse_argv(arguments)
    config = apply_overrides(load_config(path), overrides)
    if not isinstance(config, ScalingConfig):
        raise ConfigError(
            f"{path} must return a ScalingConfig for pretrain.scaling, got {type(config).__name__}"
        )
    return config, Path(path).stem, " ".join(["python -m pretrain.scaling --config", path, *overrides])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
