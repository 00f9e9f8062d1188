"""Ideas from language models: the task, the code and a sample of earlier results go in, a paragraph comes out."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from pretrain.config import ConfigError, stable_seed
from research_env.ideator.ask import Answer, Asker
from research_env.ideator.context import FIELDS, PROMPTS, history_text
from research_env.records import Node, Result
from synth.llm.api import Request
from synth.prompt import load_prompt

SEED_LIMIT = 2**31  # some servers keep seeds in 32 bits


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelIdeas:
    """Ideas and diffs by models. Several models are an ensemble: a bandit picks who has the next idea.

    `num_samples=10, num_revisions=2, num_repairs=0, fields=("idea", "metric")` is arXiv 2601.14525; repairing crashes is ours.
    """

    models: tuple[Any, ...]  # configs of synth.llm back ends
    writer: Any = None  # who writes the diffs; None is the model that had the idea
    num_samples: int = 10
    num_revisions: int = 2
    num_repairs: int = 2
    fields: tuple[str, ...] = ("idea", "metric", "status")
    focus: tuple[str, ...] = ()  # files shown first, when not all fit
    max_code_characters: int = 60_000
    max_tokens: int = 4000
    temperature: float = 1.0
    attempts: int = 6  # of a call to a busy model
    first_wait_s: float = 1.0

    def __post_init__(self) -> None:
        faults = []
        if not self.models:
            faults.append("ideas.models must name at least one model, got ()")
        for name in ("num_samples", "max_code_characters", "max_tokens", "attempts"):
            if getattr(self, name) < 1:
                faults.append(f"ideas.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("num_revisions", "num_repairs"):
            if getattr(self, name) < 0:
                faults.append(f"ideas.{name} must be at least 0, got {getattr(self, name)}")
        faults += [
            f"ideas.fields must be among {', '.join(FIELDS)}, got {field!r}"
            for field in self.fields
            if field not in FIELDS
        ]
        if faults:
            raise ConfigError(*faults)


def propose(
    asker: Asker,
    config: ModelIdeas,
    *,
    key: str,
    exploits: bool,
    task: str,
    code: str,
    shown: Sequence[tuple[Node, Result]],
) -> Answer:
    """One idea in words. `shown` are results to combine (`exploits`) or to differ from."""
    prompt = load_prompt("exploit" if exploits else "explore", PROMPTS)
    system, user = prompt.fill(task=task, code=code, history=history_text(shown, config.fields))
    return asker.ask([make_request(config, system, user, key)])[0]


def make_request(config: ModelIdeas, system: str, user: str, *key: object) -> Request:
    """A request whose sampling seed belongs to the slot in the campaign, so that a replay asks the same."""
    return Request(
        system=system,
        user=user,
        max_tokens=config.max_tokens,
        temperature=config.temperature,
        seed=stable_seed(*key) % SEED_LIMIT,
    )
