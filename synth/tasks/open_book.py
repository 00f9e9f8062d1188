"""Multiple choice with the book open: passages are found, ordered and put before the question.

As in arXiv 2409.07431, section 5: the query is the question with its context and options, many passages are found,
reranked, and the best k are shown, the best one last. There 128 are found, k is 8 or 16, passages hold 1,024
characters; the grid over these is chosen on validation documents.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pretrain.config import ConfigError
from synth.llm.api import LLM
from synth.prompt import load_prompt
from synth.question import Graded, Question, ask_text
from synth.retrieval.chunk import Passage, passages_of
from synth.retrieval.rerank import Reranker
from synth.retrieval.search import Bm25Config, Query, RetrieverConfig, recall
from synth.tasks.closed_book import SampledConfig, sample_choice


@dataclass(frozen=True, kw_only=True)
class OpenBookConfig:
    """`found` passages are searched for, the best `shown` are put into the prompt, the best one first or last."""

    characters: int = 1024
    found: int = 128
    shown: int = 8
    best_last: bool = True
    retriever: RetrieverConfig = field(default_factory=Bm25Config)
    sampled: SampledConfig = field(default_factory=SampledConfig)

    def __post_init__(self):
        if not 1 <= self.shown <= self.found:
            raise ConfigError(f"shown must lie in [1, found], got {self.shown} of {self.found}")


@dataclass(frozen=True, kw_only=True)
class Opened:
    """The passages of each question, best first, and how often the right document is among the first k."""

    passages: Mapping[str, Sequence[Passage]]
    recall_at: Mapping[int, float]


async def open_books(
    documents: Sequence[tuple[str, str]],
    heads: Mapping[str, str],
    questions: Sequence[Question],
    config: OpenBookConfig,
    reranker: Reranker,
    folder: Path,
) -> Opened:
    """Find and order passages of (id, text) `documents` for every question. `heads` names each document."""
    passages = passages_of(documents, heads, config.characters)
    queries = [query_of(question, heads.get(question.document, "")) for question in questions]
    retriever = config.retriever.build(passages, folder)
    found = [numbers for numbers in retriever.find(queries, config.found)]

    async def reranked(query: Query, numbers: list[int]) -> list[int]:
        order = await reranker.order(query.text, [passages[number].shown for number in numbers])
        return [numbers[place] for place in order]

    ordered = await asyncio.gather(*(reranked(q, n) for q, n in zip(queries, found, strict=True)))
    ks = sorted({1, 2, 4, 8, 16, config.shown})
    return Opened(
        passages={
            question.id: [passages[number] for number in numbers[: config.shown]]
            for question, numbers in zip(questions, ordered, strict=True)
        },
        recall_at={k: recall(ordered, queries, passages, k) for k in ks},
    )


def query_of(question: Question, head: str) -> Query:
    """The question with its context and its options."""
    text = ask_text(question)
    return Query(text=f"{head}\n{text}" if head else text, document=question.document)


def passages_text(passages: Sequence[Passage], *, best_last: bool) -> str:
    """The passages as the prompt shows them."""
    ordered = list(reversed(passages)) if best_last else list(passages)
    return "\n\n".join(passage.shown for passage in ordered)


async def grade_open_book(
    llm: LLM,
    questions: Sequence[Question],
    contexts: Mapping[str, str],
    opened: Opened,
    config: OpenBookConfig,
) -> list[Graded]:
    """Ask every question with its passages, as often as `config.sampled` says."""

    async def one(question: Question) -> Graded:
        shown = passages_text(opened.passages[question.id], best_last=config.best_last)
        system, user = load_prompt("open_book").fill(
            passages=shown, context=contexts[question.document], question=ask_text(question)
        )
        return await sample_choice(llm, question, system, user, config.sampled)

    return list(await asyncio.gather(*(one(question) for question in questions)))
