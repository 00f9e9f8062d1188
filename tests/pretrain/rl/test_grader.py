"""A reward that raises, hangs, dies or lies costs its sample and nothing else."""

import dataclasses
import math
import os
import time

import pytest

from pretrain.rl.grader import Grade, Grader
from pretrain.rl.problem import Problem

PROBLEM = Problem(id="p", prompt="?", answer="1")


class Unpickles(float):
    """A number that runs code in whoever unpickles it."""

    def __reduce__(self):
        return os._exit, (4,)


@dataclasses.dataclass(frozen=True)
class Hostile:
    """Does what the text says."""

    def __call__(self, problem, text):
        match text:
            case "raise":
                raise KeyError("no")
            case "hang":
                time.sleep(60)
            case "die":
                os._exit(3)
            case "nan":
                return math.nan
            case "text":
                return "1.0"
            case "true":
                return True
            case "list":
                return [1.0]
            case "huge":
                return 10**400
            case "unpickles":
                return Unpickles(1.0)
            case "pid":
                return float(os.getpid())
        return float(text)


def test_every_fault_drops_one_sample_with_its_reason():
    texts = ["1", "raise", "2", "hang", "3", "die", "nan", "text", "true", "list", "huge", "4"]
    with Grader(Hostile(), timeout_s=1.0) as grader:
        grades = grader.grade([(PROBLEM, text) for text in texts])
        assert [g.reward for g in grades] == [
            1.0,
            None,
            2.0,
            None,
            3.0,
            None,
            None,
            None,
            None,
            None,
            None,
            4.0,
        ]
        assert [g.reason for g in grades if g.reward is None] == [
            "raised", "timeout", "died", "not finite", "not a number", "not a number", "not a number", "not finite",
        ]  # fmt: skip
        assert grader.grade([]) == []
        assert grader.grade([(PROBLEM, "5")]) == [Grade(5.0)]


def test_nothing_of_it_outlives_its_block():
    with Grader(Hostile(), timeout_s=1.0) as grader:
        grader.grade([(PROBLEM, "1")])
        process = grader._process
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)


def test_rewards_are_computed_by_another_process_and_only_numbers_come_back():
    with Grader(Hostile(), timeout_s=1.0) as grader:
        grades = grader.grade([(PROBLEM, "pid"), (PROBLEM, "unpickles"), (PROBLEM, "pid")])
        assert grades[0].reward == grades[2].reward == grader._process.pid
        assert grades[0].reward != os.getpid()
        assert grades[1] == Grade(1.0)


def test_a_reward_that_another_process_cannot_import_is_named():
    class Here:
        def __call__(self, problem, text):
            return 1.0

    here = Here()
    here.__class__.__reduce__ = lambda self: (__import__, ("no_such_module",))
    with Grader(here, timeout_s=1.0) as grader, pytest.raises(RuntimeError, match="importable in a process"):
        grader.grade([(PROBLEM, "1")])
