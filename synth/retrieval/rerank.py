"""A language model orders the passages that a search has found: how much likelier is yes than no?"""

import asyncio
from collections.abc import Sequence
from typing import Protocol

from synth.llm.api import LLM
from synth.prompt import load_prompt


class Reranker(Protocol):
    """Orders candidates again."""

    async def order(self, question: str, passages: Sequence[str]) -> list[int]:
        """The numbers of `passages`, best first."""
        ...


class AsFound:
    """The order of the search."""

    async def order(self, question: str, passages: Sequence[str]) -> list[int]:
        return list(range(len(passages)))


class ByLikelihood:
    """By the log-probability of "yes" against "no" to: does this passage answer the question?"""

    def __init__(self, llm: LLM):
        self._llm = llm

    async def order(self, question: str, passages: Sequence[str]) -> list[int]:
        """Ties keep the order of the search.

        Raises:
          NotImplementedError: the model gives no log-probabilities.
        """

        async def margin(passage: str) -> float:
            system, user = load_prompt("rerank").fill(passage=passage, question=question)
            prompt = f"{system}\n\n{user}"
            yes, no = await asyncio.gather(self._llm.score(prompt, " yes"), self._llm.score(prompt, " no"))
            return yes - no

        margins = await asyncio.gather(*(margin(passage) for passage in passages))
        return sorted(range(len(passages)), key=lambda i: (-margins[i], i))
