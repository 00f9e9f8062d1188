"""A model that is a pure function of the request: for tests, dry runs and recipes without a key."""

import asyncio
import json
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pretrain.config import ConfigError, local, stable_seed
from synth.llm.api import LLM, Overloaded, Reply, Request, Usage

_WORD = re.compile(r"[^\W\d_]{2,}")


@dataclass(frozen=True, kw_only=True)
class ScriptedConfig:
    """Replies made of words of the prompt. The rates are the shares of calls that go wrong, for tests."""

    words_per_reply: int = 120
    malformed: float = 0.0
    refused: float = 0.0
    truncated: float = 0.0
    overloaded: float = local(0.0)
    latency_s: float = local(0.0)
    concurrency: int = local(64)
    prompt_usd_per_million: float = local(0.0)
    completion_usd_per_million: float = local(0.0)

    def __post_init__(self):
        for name in ("malformed", "refused", "truncated", "overloaded"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must lie in [0, 1], got {getattr(self, name)}")

    def identity(self) -> Mapping[str, Any]:
        """Everything that decides the replies."""
        rates = {"malformed": self.malformed, "refused": self.refused, "truncated": self.truncated}
        return {"model": "scripted", "words_per_reply": self.words_per_reply, **rates}

    def build(self) -> LLM:
        """The model."""
        return ScriptedLLM(self)


class ScriptedLLM:
    """Chooses words of the user message by a hash of the request; fills a JSON schema when one is given."""

    def __init__(self, config: ScriptedConfig):
        self._config = config
        self._asked_before: set[int] = set()

    @property
    def identity(self) -> Mapping[str, Any]:
        """Everything that decides the replies."""
        return self._config.identity()

    async def generate(self, request: Request) -> Reply:
        """A reply that depends on the request alone; `overloaded` calls fail the first time they are asked."""
        config = self._config
        if config.latency_s:
            await asyncio.sleep(config.latency_s)
        seed = stable_seed(json.dumps(request.to_json(), sort_keys=True))
        chance = random.Random(seed)
        if chance.random() < config.overloaded and seed not in self._asked_before:
            self._asked_before.add(seed)
            raise Overloaded("scripted: busy", retry_after_s=0.0)
        fate = chance.random()
        text = self._answer(request, chance)
        finish = "stop"
        if fate < config.refused:
            text, finish = "I cannot help with this.", "refused"
        elif fate < config.refused + config.truncated:
            text, finish = text[: len(text) // 2], "length"
        elif fate < config.refused + config.truncated + config.malformed:
            text = text.replace("}", "").replace("]", "") if request.json_schema else ""
        usage = Usage(prompt_tokens=len(request.system + request.user) // 4, completion_tokens=len(text) // 4)
        return Reply(text=text, finish=finish, usage=usage, model="scripted")

    def _answer(self, request: Request, chance: random.Random) -> str:
        words = list(dict.fromkeys(_WORD.findall(request.user))) or ["nothing"]
        if request.json_schema is not None:
            return json.dumps(_fill(request.json_schema, words, chance), ensure_ascii=False)
        sentences = []
        for start in range(0, self._config.words_per_reply, 12):
            length = min(12, self._config.words_per_reply - start)
            sentences.append(" ".join(chance.choice(words) for _ in range(length)).capitalize() + ".")
        return " ".join(sentences)

    async def score(self, prompt: str, continuation: str) -> float:
        """Minus the number of words of `continuation` that `prompt` does not hold: a reader of the open book."""
        known = set(_WORD.findall(prompt))
        return -float(sum(word not in known for word in _WORD.findall(continuation)))

    async def close(self) -> None:
        """Nothing to release."""


def _fill(schema: Mapping[str, Any], words: list[str], chance: random.Random) -> Any:
    kind = schema["type"]
    if kind == "object":
        return {name: _fill(part, words, chance) for name, part in schema["properties"].items()}
    if kind == "array":
        length = chance.randint(4, 8)
        if schema["items"]["type"] == "string":
            return chance.sample(words, min(length, len(words)))
        return [_fill(schema["items"], words, chance) for _ in range(length)]
    if kind == "integer":
        return chance.randint(0, 3)
    return " ".join(chance.choice(words) for _ in range(12))
