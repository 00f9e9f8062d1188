"""Programs are paid for passing tests that they cannot see, and for nothing else."""

import dataclasses
import json
import os

import pytest

from pretrain.config import ConfigError
from pretrain.rl.grader import Grader
from pretrain.rl.problem import Problem
from research_env.rl.code_reward import CodeReward, isolation_here
from research_env.sandbox.ladder import SandboxConfig
from research_env.sandbox.run import scratch_root

PROBLEM = Problem(id="double", prompt="Double it.", answer=json.dumps([["3\n", "6\n"], ["-4\n", "-8\n"]]))
RIGHT = "print(2 * int(input()))"


def fenced(code):
    return f"Here it is:\n```python\n{code}\n```\n"


@pytest.fixture(scope="module")
def reward(isolation):
    return CodeReward(sandbox=SandboxConfig(level=isolation.level), wall_s=3.0)


def test_a_program_that_passes_every_test_is_right(reward):
    assert reward(PROBLEM, fenced(RIGHT)) == 1.0
    assert reward(PROBLEM, fenced(f"import sys\nprint('a warning', file=sys.stderr)\n{RIGHT}")) == 1.0


@pytest.mark.parametrize(
    "text",
    [
        RIGHT,  # no program was marked
        fenced(RIGHT) + fenced(RIGHT),  # two answers
        fenced("print(6)"),  # one of two tests
        fenced(f"{RIGHT}; print(1)"),
        fenced("print('6\\n-8')"),  # both expected outputs
        fenced(f"{RIGHT}\nraise SystemExit(1)"),
        fenced("raise SystemExit(0)"),  # leaving early passes an assertion, and no comparison
        fenced("import os; os._exit(0)"),
        fenced("import builtins; builtins.AssertionError = None; __builtins__.__dict__['assert'] = None"),
        fenced("import time; time.sleep(60)"),
        fenced("print('9' * 10**6)"),
        fenced("print(7)\nprint(str(2 * int(input())).ljust(15_999))"),  # another answer, pushed out of what is kept
        fenced("x = 'a' * 10**10"),
        fenced("def f(:"),
        fenced("import socket; socket.create_connection(('1.1.1.1', 53), 1)"),
        fenced("print(open('/proc/1/environ').read())"),
        "",
        "```python\n" + RIGHT,
    ],
)  # fmt: skip
def test_what_passes_not_all_or_plays_with_the_checker_earns_nothing(reward, text):
    assert reward(PROBLEM, text) == 0.0


def test_in_its_own_process_a_program_touches_neither_grader_nor_policy(reward, tmp_path):
    mark = tmp_path / "mark"
    steal = f"open({str(mark)!r}, 'w').write('x')\n{RIGHT}"
    kill = f"import os, signal\nos.kill({os.getpid()}, signal.SIGKILL)\n{RIGHT}"
    with Grader(reward, timeout_s=20.0) as grader:
        grades = grader.grade([(PROBLEM, fenced(code)) for code in (steal, kill, RIGHT)])
        assert [grade.reward for grade in grades] == [0.0, 0.0, 1.0]
    assert not mark.exists()


def test_what_a_grader_that_was_killed_left_on_the_host_is_removed_by_the_next(reward):
    """A sample that takes longer than the grader waits; its jail dies with the grader, its folder and groups do not."""
    with Grader(dataclasses.replace(reward, wall_s=60.0), timeout_s=3.0) as grader:
        grades = grader.grade([(PROBLEM, fenced(code)) for code in ("import time; time.sleep(50)", RIGHT)])
        assert [(grade.reward, grade.reason) for grade in grades] == [(None, "timeout"), (1.0, "")]
    prefix = f"autodidact-code-{os.getpid()}-"
    folders = [scratch_root(), *(path for path in hierarchies_of(reward) if path is not None)]
    assert [path for folder in folders for path in folder.glob(prefix + "*")] == []


def hierarchies_of(reward):
    found = isolation_here(reward.sandbox).hierarchies
    return [*found.v1.values(), found.v2]


@pytest.mark.parametrize("answer", ["", "6", "[]", '[["3"]]', "[[3, 6]]", json.dumps([["", "x" * 9000]])])
def test_tests_that_say_nothing_are_named(reward, answer):
    with pytest.raises(ConfigError, match="double must"):
        reward(Problem(id="double", prompt="?", answer=answer), fenced(RIGHT))


def test_bad_limits_are_refused():
    with pytest.raises(ConfigError, match="wall_s must be positive"):
        CodeReward(wall_s=0)
