"""The far side of a job: make the call, keep what it returned or raised.

`python -m pretrain.jobs.call CALL OUTCOME` runs the call pickled in one file and writes its outcome to the
other, whole or not at all. Standard input is the life line: when it ends, the parent is gone, and so is the
process group of this job.
"""

import os
import pickle
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from pretrain.config import ConfigError
from pretrain.jobs.api import Done, Job, Outcome, Raised
from pretrain.rundir import write_atomic


def invoke(job: Job) -> Outcome:
    """Call the job here: `Done` or `Raised`."""
    started_s = time.monotonic()
    try:
        value = job.function(*job.arguments)
    except (Exception, SystemExit) as error:  # the edge of a job: whatever it raises is its outcome
        return Raised(
            name=job.name,
            wall_s=time.monotonic() - started_s,
            exception=type(error).__qualname__,
            message=str(error),
            traceback=traceback.format_exc(),
            faults=error.faults if isinstance(error, ConfigError) else (),
        )
    return Done(name=job.name, value=value, wall_s=time.monotonic() - started_s)


def dump_call(path: Path, job: Job) -> None:
    """Write a call so that a new process finds the modules it names.

    Raises:
      ConfigError: the function or an argument cannot be pickled by reference.
    """
    try:
        data = pickle.dumps({"sys.path": [os.path.abspath(p) for p in sys.path], "job": pickle.dumps(job)})
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"a job's function and arguments must be picklable, got {job.name}: {error}; use functions and "
            "classes that a module defines"
        ) from error
    write_atomic(path, data)


def load_outcome(path: Path) -> Outcome:
    return pickle.loads(path.read_bytes())


def _die_with_parent(life_line: int) -> None:
    def watch() -> None:
        while os.read(life_line, 4096):
            pass
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True, name="life line").start()


def _pickled(outcome: Outcome) -> bytes:
    try:
        return pickle.dumps(outcome)
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raised = Raised(
            name=outcome.name,
            wall_s=outcome.wall_s,
            exception=type(error).__qualname__,
            message=f"the value of a job must be picklable: {error}",
            traceback="",
        )
        return pickle.dumps(raised)


def main(call_path: str, outcome_path: str) -> None:
    life_line = os.dup(0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    _die_with_parent(life_line)
    call: dict[str, Any] = pickle.loads(Path(call_path).read_bytes())
    sys.path[:] = call["sys.path"]
    outcome = invoke(pickle.loads(call["job"]))
    if isinstance(outcome, Raised):
        print(outcome.traceback, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    write_atomic(outcome_path, _pickled(outcome))


if __name__ == "__main__":
    main(*sys.argv[1:])
