"""Summaries judged claim by claim: how many claims of a summary are false, and how many say what matters?

After arXiv 2409.07431, section 5.2, whose judge and prompts are unpublished: a model that is given the name of a
document alone writes summaries; a judge splits each into claims and, with the document at hand, calls each claim
false, cosmetic or salient; the same is done with a human summary, whose counts are the unit. A share of the claims
is judged twice, and Cohen's kappa of the two verdicts is part of the result: below 0.6 the numbers are marked.
"""

import asyncio
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

from pretrain.config import ConfigError, stable_seed
from synth.llm.api import LLM, Request, parse_json
from synth.prompt import load_prompt

Verdict = Literal["false", "cosmetic", "salient"]
VERDICTS: tuple[Verdict, ...] = ("false", "cosmetic", "salient")
KAPPA_AT_LEAST = 0.6
_ATTEMPTS = 3
_SPLIT_SCHEMA = {
    "type": "object",
    "properties": {"claims": {"type": "array", "items": {"type": "string"}}},
    "required": ["claims"],
    "additionalProperties": False,
}
_VERDICT_SCHEMA = {
    "type": "object",
    "properties": {"verdict": {"enum": list(VERDICTS)}},
    "required": ["verdict"],
    "additionalProperties": False,
}


@dataclass(frozen=True, kw_only=True)
class ClaimsConfig:
    """`words` are the lengths of the summaries that are asked for; `twice` is the share of claims judged again."""

    words: tuple[int, ...] = (50, 150, 400)
    max_tokens: int = 1024
    temperature: float = 0.7
    twice: float = 0.1
    seed: int = 0

    def __post_init__(self):
        faults = []
        if not self.words or min(self.words) < 1:
            faults.append(f"words must name at least one positive length, got {self.words}")
        if not 0 <= self.twice <= 1:
            faults.append(f"twice must lie in [0, 1], got {self.twice}")
        if faults:
            raise ConfigError(*faults)


@dataclass(frozen=True, kw_only=True)
class Judged:
    """The verdicts on one summary, and the pairs of those that were judged twice.

    `unread` counts replies of the judge that could not be read after three attempts; they are in no other number.
    """

    document: str
    verdicts: tuple[Verdict, ...]
    pairs: tuple[tuple[Verdict, Verdict], ...] = ()
    unread: int = 0

    def count(self, verdict: Verdict) -> int:
        """How many claims have it."""
        return self.verdicts.count(verdict)


@dataclass(frozen=True, kw_only=True)
class ClaimScore:
    """Sums over summaries in units of the human ones: salient over their salient claims, false over all of theirs."""

    salient: float
    false: float
    num_claims: int
    unread: int
    kappa: float | None

    @property
    def is_marked(self) -> bool:
        """Whether the judge disagrees with itself too often for the numbers to be quoted as they are."""
        return self.kappa is None or self.kappa < KAPPA_AT_LEAST


async def write_summaries(
    llm: LLM, contexts: Mapping[str, str], config: ClaimsConfig
) -> dict[int, dict[str, str]]:
    """For each length, a summary of each document by a model that is told its name ("The Title" by ..) alone."""

    async def one(document: str, words: int) -> str:
        system, user = load_prompt("claims_summary").fill(context=contexts[document], words=str(words))
        seed = stable_seed(config.seed, "summary", document, words) % 2**31
        request = Request(
            system=system, user=user, max_tokens=config.max_tokens, temperature=config.temperature, seed=seed
        )
        return (await llm.generate(request)).text

    found = {}
    for words in config.words:
        texts = await asyncio.gather(*(one(document, words) for document in contexts))
        found[words] = dict(zip(contexts, texts, strict=True))
    return found


async def judge_summaries(
    judge: LLM, summaries: Mapping[str, str], sources: Mapping[str, str], config: ClaimsConfig
) -> list[Judged]:
    """Split and judge the summary of each document. The judge is told neither who wrote it nor that others exist."""
    return list(
        await asyncio.gather(
            *(
                _judge_one(judge, document, text, sources[document], config)
                for document, text in summaries.items()
            )
        )
    )


async def _judge_one(judge: LLM, document: str, summary: str, source: str, config: ClaimsConfig) -> Judged:
    claims = await _split(judge, summary, config)
    if claims is None:
        return Judged(document=document, verdicts=(), unread=1)
    first = await asyncio.gather(*(_verdict(judge, source, claim, 0, config) for claim in claims))
    again = [
        i
        for i, claim in enumerate(claims)
        if random.Random(stable_seed(config.seed, "twice", document, i, claim)).random() < config.twice
    ]
    second = await asyncio.gather(*(_verdict(judge, source, claims[i], 1, config) for i in again))
    pairs: list[tuple[Verdict, Verdict]] = []
    for i, other in zip(again, second, strict=True):
        verdict = first[i]
        if verdict is not None and other is not None:
            pairs.append((verdict, other))
    return Judged(
        document=document,
        verdicts=tuple(verdict for verdict in first if verdict),
        pairs=tuple(pairs),
        unread=sum(verdict is None for verdict in (*first, *second)),
    )


async def _split(judge: LLM, summary: str, config: ClaimsConfig) -> list[str] | None:
    system, user = load_prompt("claims_split").fill(summary=summary)
    for attempt in range(_ATTEMPTS):
        seed = stable_seed(config.seed, "split", summary, attempt) % 2**31
        request = Request(
            system=system,
            user=user,
            max_tokens=config.max_tokens,
            temperature=0.0,
            seed=seed,
            json_schema=_SPLIT_SCHEMA,
        )
        claims = _field(await judge.generate(request), "claims")
        if isinstance(claims, list) and all(isinstance(claim, str) for claim in claims):
            return [claim.strip() for claim in claims if claim.strip()]
    return None


async def _verdict(judge: LLM, source: str, claim: str, number: int, config: ClaimsConfig) -> Verdict | None:
    system, user = load_prompt("claims_verdict").fill(source=source, claim=claim)
    for attempt in range(_ATTEMPTS):
        seed = stable_seed(config.seed, "verdict", claim, number, attempt) % 2**31
        # The second verdict is an independent draw: at temperature 0 a judge always agrees with itself.
        request = Request(
            system=system,
            user=user,
            max_tokens=64,
            temperature=config.temperature,
            seed=seed,
            json_schema=_VERDICT_SCHEMA,
        )
        verdict = _field(await judge.generate(request), "verdict")
        if verdict in VERDICTS:
            return cast(Verdict, verdict)
    return None


def _field(reply: object, name: str) -> object:
    """A field of the JSON object in a reply, or None."""
    try:
        value = parse_json(getattr(reply, "text", ""))
    except ValueError:
        return None
    return value.get(name) if isinstance(value, dict) else None


def kappa(pairs: Sequence[tuple[Verdict, Verdict]]) -> float | None:
    """Cohen's kappa: agreement beyond what the shares of the verdicts give by chance; None without pairs.

    Two judges that both use one verdict alone agree by necessity: that is 1 here, the limit of perfect agreement.
    """
    if not pairs:
        return None
    total = len(pairs)
    agree = sum(a == b for a, b in pairs) / total
    left, right = (Counter(side) for side in zip(*pairs, strict=True))
    expected = sum(left[v] * right[v] for v in VERDICTS) / total**2
    return 1.0 if expected == 1.0 else (agree - expected) / (1.0 - expected)


def compare(model: Sequence[Judged], human: Sequence[Judged]) -> ClaimScore:
    """The summaries of a model beside the human ones of the same documents.

    Raises:
      ValueError: other documents, or human summaries without a salient claim.
    """
    if sorted(j.document for j in model) != sorted(j.document for j in human):
        raise ValueError("summaries to compare must be of the same documents, they are not")
    unit = sum(j.count("salient") for j in human)
    if not unit:
        raise ValueError("the human summaries must hold a salient claim to be a unit, they hold none")
    return ClaimScore(
        salient=sum(j.count("salient") for j in model) / unit,
        false=sum(j.count("false") for j in model) / sum(len(j.verdicts) for j in human),
        num_claims=sum(len(j.verdicts) for j in model),
        unread=sum(j.unread for j in model),
        kappa=kappa([pair for j in (*model, *human) for pair in j.pairs]),
    )
