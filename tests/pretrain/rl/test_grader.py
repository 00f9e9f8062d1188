"""A reward that raises, hangs, dies or lies costs its sample and nothing else."""

import dataclasses
import math
import os
import time

import pytest

from pretrain.rl.grader import Grade, Grader
from pretrain.rl.problem import Problem

PROBLEM = Problem(id="p", prompt="?", answer="1")


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
        return float(text)


def test_every_fault_drops_one_sample_with_its_reason():
    texts = ["1", "raise", "2", "hang", "3", "die", "nan", "text", "true", "list", "4"]
    with Grader(Hostile(), timeout_s=1.0) as grader:
        grades = grader.grade([(PROBLEM, text) for text in texts])
        assert [g.reward for g in grades] == [1.0, None, 2.0, None, 3.0, None, None, None, None, None, 4.0]
        assert [g.reason for g in grades if g.reward is None] == [
            "raised", "timeout", "died", "not finite", "not a number", "not a number", "not a number",
        ]  # fmt: skip
        assert grader.grade([]) == []
        assert grader.grade([(PROBLEM, "5")]) == [Grade(5.0)]


def test_nothing_of_it_outlives_its_block():
    with Grader(Hostile(), timeout_s=1.0) as grader:
        grader.grade([(PROBLEM, "1")])
        process = grader._process
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)
