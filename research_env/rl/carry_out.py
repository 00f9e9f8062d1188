"""From an idea in words to a diff: by the grammar that mutation operators speak, or by a model that writes code.

What comes back is a diff, or the reason why there is none; the environment reads either and refuses the second.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Protocol

from pretrain.config import ConfigError
from research_env.diff import emit_diff, make_diff
from research_env.env import AIResearchEnv
from research_env.executor.implement import implement
from research_env.ideator.ask import Asker
from research_env.ideator.context import code_text, task_text
from research_env.ideator.llm import ModelIdeas
from research_env.ideator.mutate import Site, find_sites, replace_values
from research_env.records import digest
from research_env.task import Task


class Executor(Protocol):
    """Writes the diff of an idea; the same words give the same text."""

    def carry_out(self, idea: str) -> str:
        """A diff against the baseline, or why there is none."""
        ...


class ExecutorConfig(Protocol):
    """Who carries ideas out: the class is the choice."""

    def build(self, env: AIResearchEnv) -> Executor: ...


# --- by grammar

_NAME, _VALUE = r"(?P<name>[A-Za-z_]\w*)", r"(?P<value>[-+.\w]+?)"
# The sentences of ideator/mutate.py.
_SENTENCES = (
    ("change", re.compile(rf"Change {_NAME} from (?P<old>[-+.\w]+) to {_VALUE}")),
    ("turn", re.compile(rf"Turn {_NAME} (?P<value>on|off)")),
    ("change", re.compile(rf"Turn {_NAME} on with {_VALUE}")),
    ("use", re.compile(rf"Use {_VALUE} for {_NAME} in place of (?P<old>[-+.\w]+)")),
    ("double", re.compile(rf"Double {_NAME} and halve (?P<other>[A-Za-z_]\w*)")),
)
_ENDS = re.compile(r"\.(?:\s+|$)")
MAX_SENTENCES = 4


class Unclear(ValueError):
    """A sentence that is no instruction to change a constant of this code."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SentenceExecutor:
    """Reads ideas as mutation operators write them: "Change RATE from 0.1 to 0.25." No model, no guess."""

    focus: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()

    def build(self, env: AIResearchEnv) -> "Sentences":
        """For this codebase."""
        return Sentences(env.task, self)


class Sentences:
    """See `SentenceExecutor`."""

    def __init__(self, task: Task, config: SentenceExecutor):
        self._tree = task.baseline
        self._sites = find_sites(task.baseline, task.policy, config.frozen, config.focus)

    def carry_out(self, idea: str) -> str:
        """The diff of all sentences together."""
        sentences = [part for part in _ENDS.split(idea.strip()) if part]
        if not 1 <= len(sentences) <= MAX_SENTENCES or not idea.rstrip().endswith("."):
            return f"no idea of 1 to {MAX_SENTENCES} whole sentences: {idea[:200]!r}"
        try:
            changes = [change for sentence in sentences for change in self._read(sentence)]
        except Unclear as error:
            return str(error)
        if len({(site.path, site.line, site.start) for site, _ in changes}) < len(changes):
            return f"the idea changes one constant twice: {idea[:200]!r}"
        return emit_diff(make_diff(self._tree, replace_values(self._tree, changes)))

    def _read(self, sentence: str) -> Sequence[tuple[Site, str]]:
        read = [(kind, found) for kind, pattern in _SENTENCES if (found := pattern.fullmatch(sentence))]
        if not read:
            raise Unclear(f"not an instruction that is understood: {sentence[:200]!r}")
        kind, found = read[0]
        match kind:
            case "change":
                old = found.groupdict().get("old")
                site = self._site(found["name"], old)
                if isinstance(site.value, (bool, str)) or (old is None and site.value != 0):
                    raise Unclear(f"{site.name} is {site.value!r}; that is no number to change so")
                return [(site, _like(site, found["value"]))]
            case "turn":
                site = self._site(found["name"], None)
                if not isinstance(site.value, bool):
                    raise Unclear(f"{site.name} is {site.value!r}; that is no switch")
                return [(site, str(found["value"] == "on"))]
            case "use":
                site = self._site(found["name"], found["old"])
                if found["value"] not in site.choices:
                    raise Unclear(
                        f"{site.name} must be one of {', '.join(site.choices)}, got {found['value']}"
                    )
                return [(site, f'"{found["value"]}"')]
            case _:
                more, less = self._site(found["name"], None), self._site(found["other"], None)
                for site in (more, less):
                    if isinstance(site.value, bool) or not isinstance(site.value, int):
                        raise Unclear(
                            f"{site.name} is {site.value!r}; only whole numbers are doubled and halved"
                        )
                return [(more, str(int(more.value) * 2)), (less, str(int(less.value) // 2))]

    def _site(self, name: str, old: str | None) -> Site:
        """The constant of that name, of several the one with that value."""
        named = [site for site in self._sites if site.name == name]
        fitting = [site for site in named if old is None or str(site.value) == old]
        if len(fitting) != 1:
            values = ", ".join(str(site.value) for site in named) or "nothing"
            raise Unclear(f"one constant {name} must be {old or 'in the code'}, found {values}")
        return fitting[0]


def _like(site: Site, text: str) -> str:
    """`text` as a number of the site's kind."""
    assert isinstance(site.value, (int, float))
    try:
        value = type(site.value)(text)
    except ValueError:
        raise Unclear(f"{site.name} is {site.value!r}, and {text[:40]!r} is no such number") from None
    if not math.isfinite(value):
        raise Unclear(f"{site.name} must be finite, got {text[:40]}")
    return repr(value)


# --- by a model


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelExecutor:
    """A model writes the diff (samples, then revisions that see the error); its calls are rows of the ledger."""

    ideas: ModelIdeas

    def __post_init__(self) -> None:
        if len(self.ideas.models) != 1 or self.ideas.writer is not None:
            raise ConfigError("executor.ideas must name one model and no writer: the policy has the ideas")

    def build(self, env: AIResearchEnv) -> "ModelWrites":
        """For this codebase."""
        return ModelWrites(env, self.ideas)


class ModelWrites:
    """See `ModelExecutor`."""

    def __init__(self, env: AIResearchEnv, ideas: ModelIdeas):
        self._env, self._ideas = env, ideas
        self._asker = Asker(
            env.ledger, ideas.models[0], env.budget, attempts=ideas.attempts, first_wait_s=ideas.first_wait_s
        )
        self._task = task_text(env.task, None)
        self._code = code_text(env.task.baseline, env.task.policy, ideas.focus, ideas.max_code_characters)

    def carry_out(self, idea: str) -> str:
        """The first sample or revision that applies, else the last text.

        Raises:
          OutOfBudget, Overloaded: see `Asker.ask`.
        """
        written = implement(
            self._asker, self._ideas, key=digest("rl idea", idea), idea=idea, task=self._task, code=self._code,
            base=self._env.task.baseline, policy=self._env.task.policy,
        )  # fmt: skip
        return written.text or written.reason
