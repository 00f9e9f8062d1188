"""`python -m pretrain.prepare --config FILE key=value ...`: build the row tables of a training config, and check them.

Training builds what is missing by itself; this verb does it ahead of time, reads every byte once more against its
hash, and prints what is in the tables.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from pretrain.config import ConfigError, apply_overrides, load_config, parse_argv
from pretrain.data.tables import PreparedData, describe, mixture_plan, prepare_tables
from pretrain.train import TrainConfig


def main(argv: Sequence[str]) -> int:
    """Prepare the data of one config; the return value is the process' exit code (2: bad input)."""
    try:
        path, overrides = parse_argv(argv)
        config = apply_overrides(load_config(path), overrides)
        if not isinstance(config, TrainConfig):
            raise ConfigError(
                f"{path} must return a TrainConfig for pretrain.prepare, got {type(config).__name__}"
            )
        data = prepare_tables(config.data, config.run.workdir, config.run.seed)
        data.verify()
        print(report_text(data))
        plan = mixture_plan(config.data, data.train_tables, config.run.seed)
        plan.check_steps(config.run.num_steps)
        print(f"{config.run.num_steps:,} steps read, in epochs:")
        for name, rows in plan.counts(config.run.num_steps).items():
            table_rows = len(data.train_tables[name])
            print(f"  {name}: {rows:,} rows, {rows / max(1, table_rows):.2f} epochs")
        return 0
    except ConfigError as error:
        for fault in error.faults:
            print(f"error: {fault}", file=sys.stderr)
        return 2


def report_text(data: PreparedData) -> str:
    """What is in the tables, a line a source, and where they are."""
    lines = [f"tokenizer: {data.tokenizer.vocab_size:,} tokens, sha256 {data.tokenizer.sha256[:12]}"]
    for name, report in data.report.items():
        lines.append(describe(name, report))
        lines += [f"  bad record {bad}" for bad in report["first_bad_records"]]
        lines.append(f"  {Path(data.folders[name])}")
    lines.append(f"data fingerprint {data.fingerprint[:16]}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
