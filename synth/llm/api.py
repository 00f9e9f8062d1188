"""What the rest of synth knows about a language model: requests, replies, usage, typed errors."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

Finish = Literal["stop", "length", "refused"]


class Overloaded(Exception):
    """The model cannot answer now (busy, timed out, connection lost); waiting may help."""

    def __init__(self, reason: str, retry_after_s: float | None = None):
        super().__init__(reason)
        self.retry_after_s = retry_after_s


class LostCall(Overloaded):
    """The call was sent and no reply came back (timed out, cut, garbled): it may have been charged."""


class BadRequest(Exception):
    """The model will never answer this request; it is recorded and not sent again."""


class OutOfBudget(Exception):
    """The next call could pass the cap on calls, tokens or money; nothing was sent."""


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Tokens of one call, or of many: usages add."""

    prompt_tokens: int = 0
    completion_tokens: int = 0

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            completion_tokens=self.completion_tokens + other.completion_tokens,
        )


@dataclass(frozen=True, kw_only=True)
class Request:
    """One call: a system and a user message, how to sample, and the JSON schema of the reply if it has one."""

    system: str
    user: str
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0
    json_schema: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """The request as plain JSON values."""
        return {
            "system": self.system,
            "user": self.user,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "stop": list(self.stop),
            "seed": self.seed,
            "json_schema": self.json_schema,
        }


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What came back. `model` is the identity that the server reported, `cached` whether it was already here."""

    text: str
    finish: Finish
    usage: Usage = field(default_factory=Usage)
    model: str = ""
    cached: bool = False


class LLM(Protocol):
    """A language model. Implementations: scripted, endpoint, local; wrappers: cached, budget, retrying."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """What decides the replies (model, not address): part of cache keys and fingerprints."""
        ...

    async def generate(self, request: Request) -> Reply:
        """Answer one request.

        Raises:
          Overloaded: try again later. BadRequest: never try again. OutOfBudget: nothing was sent.
        """
        ...

    async def score(self, prompt: str, continuation: str) -> float:
        """Log-probability in nats of `continuation` after `prompt`.

        Raises:
          NotImplementedError: this back end gives no log-probabilities.
        """
        ...

    async def close(self) -> None:
        """Release connections and files."""
        ...


class LLMConfig(Protocol):
    """The config of a back end: what it costs, how many calls it takes at once, and how to open it."""

    @property
    def prompt_usd_per_million(self) -> float: ...

    @property
    def completion_usd_per_million(self) -> float: ...

    @property
    def concurrency(self) -> int: ...

    def identity(self) -> Mapping[str, Any]:
        """What decides the replies, known before any call is made."""
        ...

    def build(self) -> LLM: ...


def cost_usd(config: LLMConfig, usage: Usage) -> float:
    """The price of `usage` in US dollars."""
    prompt = usage.prompt_tokens * config.prompt_usd_per_million
    return (prompt + usage.completion_tokens * config.completion_usd_per_million) / 1e6


def request_key(identity: Mapping[str, Any], request: Request) -> str:
    """The content address of a call (64 hex digits): equal keys, equal replies."""
    body = json.dumps([dict(identity), request.to_json()], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(body.encode()).hexdigest()


def parse_json(text: str) -> Any:
    """The first JSON object or array in `text`, which may stand in a code fence or between sentences.

    Nothing is repaired: a missing bracket or a trailing comma is malformed.

    Raises:
      ValueError: there is none.
    """
    decoder = json.JSONDecoder()
    for start, char in enumerate(text):
        if char in "{[":
            try:
                return decoder.raw_decode(text, start)[0]
            except ValueError:
                continue
    raise ValueError("the reply holds no JSON object")
