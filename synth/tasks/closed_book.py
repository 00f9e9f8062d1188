"""Multiple choice with the book closed: by sampled reasoning, or by the likelihood of each option."""

import asyncio
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pretrain.config import ConfigError, stable_seed
from synth.llm.api import LLM, Request
from synth.prompt import load_prompt
from synth.question import Graded, Question, ask_text, parse_answer


@dataclass(frozen=True, kw_only=True)
class SampledConfig:
    """`num_samples` replies a question; `choose` makes one answer of those that parse by the rule `parse`.

    The authors' code: 8 samples, temperature 0.1, 300 tokens, choose="first", parse="last".
    """

    num_samples: int = 8
    temperature: float = 0.1
    max_tokens: int = 300
    choose: Literal["first", "random", "majority"] = "first"
    parse: Literal["strict", "last"] = "strict"
    seed: int = 0

    def __post_init__(self):
        if self.num_samples < 1:
            raise ConfigError(f"num_samples must be at least 1, got {self.num_samples}")


async def grade_sampled(
    llm: LLM, questions: Sequence[Question], contexts: Mapping[str, str], config: SampledConfig
) -> list[Graded]:
    """Ask every question `num_samples` times. `contexts` names each document as the question shall ("The Title", by ...)."""

    async def one(question: Question) -> Graded:
        system, user = load_prompt("closed_book").fill(
            context=contexts[question.document], question=ask_text(question)
        )
        return await sample_choice(llm, question, system, user, config)

    return list(await asyncio.gather(*(one(question) for question in questions)))


async def sample_choice(
    llm: LLM, question: Question, system: str, user: str, config: SampledConfig
) -> Graded:
    """Ask one question `num_samples` times in these words and make one answer of the replies."""
    replies = await asyncio.gather(
        *(
            llm.generate(
                Request(
                    system=system,
                    user=user,
                    max_tokens=config.max_tokens,
                    temperature=config.temperature,
                    stop=("### Question", "### Passages"),
                    seed=stable_seed(config.seed, question.id, sample) % 2**31,
                )
            )
            for sample in range(config.num_samples)
        )
    )
    parsed = [parse_answer(reply.text, len(question.options), config.parse) for reply in replies]
    return Graded(question=question, choice=_choose(parsed, config, question.id))


def _choose(parsed: Sequence[int | None], config: SampledConfig, question_id: str) -> int | None:
    valid = [choice for choice in parsed if choice is not None]
    if not valid:
        return None
    if config.choose == "first":
        return valid[0]
    if config.choose == "random":
        return random.Random(stable_seed(config.seed, "choose", question_id)).choice(valid)
    counts = Counter(valid)
    return min(counts, key=lambda choice: (-counts[choice], choice))


async def grade_by_likelihood(
    llm: LLM,
    questions: Sequence[Question],
    *,
    context: Mapping[str, str] | None = None,
    per_byte: bool = False,
) -> list[Graded]:
    """Choose the option with the largest log-probability after the question (per byte of the option if asked).

    `context` is text to put before each question, by its id: the book, opened. Ties go to the first option.

    Raises:
      NotImplementedError: the model gives no log-probabilities.
    """

    async def one(question: Question) -> Graded:
        prompt = question.text if context is None else f"{context[question.id]} {question.text}"
        scores = await asyncio.gather(*(llm.score(prompt, f" {option}.") for option in question.options))
        if per_byte:
            scores = [s / len(option.encode()) for s, option in zip(scores, question.options, strict=True)]
        return Graded(question=question, choice=max(range(len(scores)), key=lambda i: (scores[i], -i)))

    return list(await asyncio.gather(*(one(question) for question in questions)))
