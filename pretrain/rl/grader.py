"""Rewards are computed in another process: one that hangs, dies or lies costs one sample and not the run."""

import contextlib
import dataclasses
import multiprocessing
import numbers
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

from pretrain.rl.problem import Problem
from pretrain.rl.reward import Reward

# The loss is computed in float32, where the square of a larger one is nothing finite.
_MAX_REWARD = 1e18


@dataclasses.dataclass(frozen=True)
class Grade:
    """A finite reward (in float32), or None and the reason why the sample is dropped."""

    reward: float | None
    reason: str = ""


class Grader:
    """One worker process that grades in order; it is replaced when an item takes longer than `timeout_s` or kills it.

    Use it as a context. The worker never meets parameters or devices.
    """

    def __init__(self, reward: Reward, *, timeout_s: float):
        self._reward, self._timeout_s = reward, timeout_s
        self._process: Any = None
        self._connection: Connection | None = None

    def __enter__(self) -> "Grader":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def grade(self, items: Sequence[tuple[Problem, str]]) -> list[Grade]:
        """One grade for each item, in order.

        Raises:
          RuntimeError: the process that is to grade cannot be started.
        """
        grades: list[Grade] = []
        while len(grades) < len(items):
            connection = self._open()
            try:
                connection.send(list(items[len(grades) :]))
                while len(grades) < len(items):
                    if not connection.poll(self._timeout_s):
                        grades.append(Grade(None, "timeout"))
                        break
                    grades.append(Grade(*connection.recv()))
                else:
                    return grades
            except (EOFError, OSError):
                grades.append(Grade(None, "died"))
            self.close()
        return grades

    def close(self) -> None:
        """End the worker."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            assert self._connection is not None
            self._connection.close()
            self._process = self._connection = None

    def _open(self) -> Connection:
        if self._process is None:
            context = multiprocessing.get_context("spawn")  # a fork would inherit the device's threads
            self._connection, theirs = context.Pipe()
            self._process = context.Process(target=_work, args=(theirs, self._reward), daemon=True)
            self._process.start()
            theirs.close()
            try:
                self._connection.send([])  # starting up is not the first item's time
                self._connection.recv()
            except (EOFError, OSError):
                self.close()
                raise RuntimeError(
                    f"a reward must be importable in a process of its own, got {type(self._reward).__qualname__}, whose "
                    "process ended before its first item; define it at the top of a module"
                ) from None
        assert self._connection is not None
        return self._connection


class Graders:
    """The values of samples by a reward, and verdicts on held-out answers by `judge` where that is another."""

    def __init__(self, reward: Reward, judge: Reward | None, *, timeout_s: float):
        self._reward = Grader(reward, timeout_s=timeout_s)
        self._judge = self._reward if judge is None else Grader(judge, timeout_s=timeout_s)

    def value(self, step: int, items: Sequence[tuple[Problem, str]]) -> list[Grade]:
        """Grades of samples; a reward is a pure function, the same at every step."""
        return self._reward.grade(items)

    def judge(self, items: Sequence[tuple[Problem, str]]) -> list[Grade]:
        """Grades of held-out answers."""
        return self._judge.grade(items)

    def report(self) -> dict[str, Any]:
        """Nothing beside the rewards."""
        return {}

    def close(self) -> None:
        """End the workers."""
        self._reward.close()
        self._judge.close()


def _work(connection: Connection, reward: Reward) -> None:
    with contextlib.suppress(EOFError):  # the parent has gone
        while True:
            items = connection.recv()
            if not items:
                connection.send((None, "ready"))
            for problem, text in items:
                connection.send(_checked(reward, problem, text))


def _checked(reward: Reward, problem: Problem, text: str) -> tuple[float | None, str]:
    """(reward, why there is none), of plain types: no object that a reward made is unpickled by the policy's process."""
    try:
        value = reward(problem, text)
    except Exception:  # whatever a reward raises costs its sample alone
        return None, "raised"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):  # numpy's numbers are among these
        return None, "not a number"
    try:
        number = float(value)
    except OverflowError:  # an int beyond all floats
        return None, "not finite"
    return (number, "") if abs(number) <= _MAX_REWARD else (None, "not finite")  # NaN is not
