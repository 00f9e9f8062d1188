"""Programs by their tests: each test runs the program in a jail of its own, and what it wrote is compared outside.

The program meets the input of one test and never an expected output, so nothing that it does to its own process,
leaving early or replacing `assert`, can pass. A fault of the host raises, and the grader drops the sample.
"""

import dataclasses
import functools
import json
import os
import re
import sys
import uuid
from pathlib import Path

from pretrain.config import ConfigError
from pretrain.rl.problem import Problem
from research_env.records import Limits, Status
from research_env.sandbox import cgroup
from research_env.sandbox.jail import Jail, Mount, python_mounts
from research_env.sandbox.ladder import Isolation, SandboxConfig, choose_level
from research_env.sandbox.run import TAIL_BYTES, Job, Scratch, remove_scratch, scratch_root

_FENCE = re.compile(r"^```(?:python|py)?[ \t]*\n(.*?)^```[ \t]*$", re.DOTALL | re.MULTILINE)
_MAX_CODE_BYTES = 60_000  # an argument of a command has at most 128 KiB


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodeReward:
    """1 when the only fenced program passes all tests, else 0.

    A problem's `answer` is a JSON list of [input, output] pairs: standard input, and what standard output must hold, white
    space at the ends of lines aside. RolloutConfig.reward_timeout_s must leave room for all tests of a sample.
    """

    sandbox: SandboxConfig = SandboxConfig()
    wall_s: float = 5.0  # of one test
    memory_bytes: int = 256 << 20

    def __post_init__(self) -> None:
        if not self.wall_s > 0 or self.memory_bytes < 16 << 20:
            raise ConfigError(
                f"wall_s must be positive and memory_bytes at least 16 MiB, got {self.wall_s} and {self.memory_bytes}"
            )

    def __call__(self, problem: Problem, text: str) -> float:
        """Raises:
        RuntimeError: the host could not run a test.
        """
        tests = read_tests(problem)
        programs = _FENCE.findall(text)
        if len(programs) != 1 or len(programs[0].encode()) > _MAX_CODE_BYTES or "\0" in programs[0]:
            return 0.0
        return float(all(self._passes(programs[0], given, expected) for given, expected in tests))

    def _passes(self, program: str, given: str, expected: str) -> bool:
        isolation = isolation_here(self.sandbox)
        limits = Limits(
            wall_s=self.wall_s, memory_bytes=self.memory_bytes, pids=16, disk_bytes=16 << 20, output_bytes=4 * TAIL_BYTES
        )  # fmt: skip
        name = f"{_prefix(os.getpid())}{uuid.uuid4().hex[:12]}"
        scratch = Scratch(scratch_root(), name, limits.disk_bytes)
        stdin = os.memfd_create("input")
        try:
            os.write(stdin, given.encode())
            os.lseek(stdin, 0, os.SEEK_SET)
            jail = Jail(
                level=isolation.level,
                name=name,
                stage=str(scratch.stage),
                mounts=(*python_mounts(), Mount(host=str(scratch.folder("ws")), name="ws", writable=True)),
                cwd="ws",
                environment={},
                limits=limits,
            )
            # The streams are one; errors are not output.
            argv = ["/bin/sh", "-c", 'exec "$@" 2>/dev/null', "sh", sys.executable, "-I", "-S", "-c", program]
            outcome = Job(jail, argv, isolation.hierarchies, scratch=scratch, stdin=stdin).wait()
        finally:
            os.close(stdin)
            scratch.remove()
        if not outcome.status.is_sample:
            raise RuntimeError(f"the host could not run a test: {outcome.status.value} {outcome.reason}")
        # Of more output than is kept, the beginning could be anything.
        is_whole = outcome.status is Status.OK and outcome.num_output_bytes <= TAIL_BYTES
        return is_whole and _lines(outcome.output_tail) == _lines(expected)


@functools.cache
def isolation_here(sandbox: SandboxConfig) -> Isolation:
    """Proven once in the process that grades, which first removes what graders before it were killed over."""
    isolation = choose_level(sandbox)
    _sweep(isolation)
    return isolation


def _prefix(pid: int | str) -> str:
    """Of the names of all that a grader leaves on the host; its parent's process first."""
    return f"autodidact-code-{os.getppid()}-{pid}-"


def _sweep(isolation: Isolation) -> None:
    """Remove the folders and process groups of this parent's graders that are no more."""
    root = scratch_root()
    for folder in root.glob(f"{_prefix('*')}*"):
        pid = folder.name.split("-")[3]
        if not Path("/proc", pid).exists():
            cgroup.sweep(isolation.hierarchies, folder.name)
            remove_scratch(folder)


def read_tests(problem: Problem) -> list[tuple[str, str]]:
    """The [input, output] pairs of a problem's answer.

    Raises:
      ConfigError: there are none, or an output is longer than what is kept of a program's.
    """
    try:
        tests = [(given, expected) for given, expected in json.loads(problem.answer)]
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"{problem.id} must have a JSON list of [input, output] pairs as its answer"
        ) from error
    texts = [item for test in tests for item in test]
    if not tests or not all(isinstance(item, str) for item in texts):
        raise ConfigError(
            f"{problem.id} must have at least one test, each of two texts, got {problem.answer[:80]!r}"
        )
    if max(len(expected.encode()) for _, expected in tests) > TAIL_BYTES // 2:
        raise ConfigError(f"{problem.id} must expect at most {TAIL_BYTES // 2} bytes of output")
    return tests


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]
