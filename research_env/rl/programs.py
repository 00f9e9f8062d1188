"""Tasks for programs, made on the spot: read a whole number, print what an operation with a constant makes of it."""

import dataclasses
import json
import random

from pretrain.config import ConfigError, stable_seed
from pretrain.rl.problem import Problem

_SIGNS = {"plus": "+", "minus": "-", "times": "*"}
_MAX_INPUT = 99


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgramTasksConfig:
    """ "x plus 7", "x minus 3", "x times 12", each with `num_tests` inputs; held-out tasks are never trained on.

    Answers are tests as `CodeReward` reads them, and no input of one is another's.
    """

    operations: tuple[str, ...] = ("plus", "minus", "times")
    max_constant: int = 30
    num_tests: int = 2
    num_heldout: int = 15
    seed: int = 0

    def __post_init__(self) -> None:
        faults = []
        if not self.operations or not set(self.operations) <= set(_SIGNS):
            faults.append(f"operations must be some of {', '.join(_SIGNS)}, got {self.operations}")
        if not 1 <= self.num_tests <= 10:
            faults.append(f"num_tests must lie in [1, 10], got {self.num_tests}")
        total = len(self.operations) * (self.max_constant - 1)
        if not 1 <= self.num_heldout < total:
            faults.append(
                f"num_heldout must be at least 1 and below {total}, all tasks with constants from 2 to "
                f"max_constant={self.max_constant}, got {self.num_heldout}"
            )
        if faults:
            raise ConfigError(*faults)

    def heldout(self) -> tuple[Problem, ...]:
        """The first of the seeded order."""
        return self._problems()[: self.num_heldout]

    def train(self) -> tuple[Problem, ...]:
        """The rest."""
        return self._problems()[self.num_heldout :]

    def _problems(self) -> tuple[Problem, ...]:
        pairs = [(op, number) for op in self.operations for number in range(2, self.max_constant + 1)]
        rng = random.Random(stable_seed("programs", self.seed))
        rng.shuffle(pairs)
        found = []
        for operation, constant in pairs:
            inputs = rng.sample(range(2, _MAX_INPUT + 1), self.num_tests)
            tests = [[f"{x}\n", f"{_value(operation, x, constant)}\n"] for x in inputs]
            found.append(
                Problem(
                    id=f"{operation} {constant}",
                    prompt=f"x {operation} {constant}\n",
                    answer=json.dumps(tests),
                )
            )
        return tuple(found)


def _value(operation: str, x: int, constant: int) -> int:
    return {"plus": x + constant, "minus": x - constant, "times": x * constant}[operation]


def program(problem: Problem, slip: int = 0) -> str:
    """A fenced program for a task of `ProgramTasksConfig`, its constant off by `slip`: 0 passes, all else fails."""
    operation, constant = problem.id.split()
    return f"```python\nprint(int(input()) {_SIGNS[operation]} {int(constant) + slip})\n```\n"
