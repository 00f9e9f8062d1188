"""A reward that raises, hangs, dies or lies costs its sample and nothing else."""

import dataclasses
import math
import os
import time
from fractions import Fraction

import numpy as np
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
            case "numpy":
                return np.float32(0.25)
            case "integer of numpy":
                return np.int64(3)
            case "truth of numpy":
                return np.bool_(True)
            case "array":
                return np.array([1.0])
            case "fraction":
                return Fraction(1, 4)
            case "complex":
                return 1j
            case "leave":
                raise SystemExit(0)
            case "interrupt":
                raise KeyboardInterrupt
            case "overflows":
                return -1e300
            case "infinite":
                return -math.inf
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


def test_real_numbers_of_any_kind_count_and_what_is_none_does_not():
    texts = [
        "numpy",
        "integer of numpy",
        "fraction",
        "truth of numpy",
        "array",
        "complex",
        "infinite",
        "overflows",
    ]
    with Grader(Hostile(), timeout_s=5.0) as grader:
        grades = grader.grade([(PROBLEM, text) for text in texts])
        assert grades == [
            Grade(0.25),
            Grade(3.0),
            Grade(0.25),
            *3 * [Grade(None, "not a number")],
            *2 * [Grade(None, "not finite")],
        ]
        assert all(type(g.reward) is float for g in grades[:3])
        grades = grader.grade([(PROBLEM, text) for text in ("leave", "1", "interrupt", "2")])
        assert [g.reward for g in grades] == [None, 1.0, None, 2.0]
        assert grades[0].reason == grades[2].reason == "died"


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
