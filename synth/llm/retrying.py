"""Waits and asks again while a model is overloaded, a bounded number of times."""

import asyncio
import random
from collections.abc import Mapping
from typing import Any

from synth.llm.api import LLM, Overloaded, Reply, Request

_LONGEST_WAIT_S = 60.0


class RetryingLLM:
    """Repeats calls that raise `Overloaded`: exponential waits with jitter, or what the server asked for."""

    def __init__(self, inner: LLM, *, attempts: int, first_wait_s: float):
        self._inner = inner
        self._attempts = attempts
        self._first_wait_s = first_wait_s
        self._jitter = random.Random()  # spreads retries of many clients; never decides a result
        self.num_retries = 0

    @property
    def identity(self) -> Mapping[str, Any]:
        """That of the model behind it."""
        return self._inner.identity

    async def generate(self, request: Request) -> Reply:
        """Answer, waiting up to `attempts - 1` times; the last `Overloaded` is passed on."""
        for attempt in range(self._attempts):
            try:
                return await self._inner.generate(request)
            except Overloaded as error:
                if attempt + 1 == self._attempts:
                    raise
                wait_s = self._first_wait_s * 2**attempt * self._jitter.uniform(0.5, 1.0)
                if error.retry_after_s is not None:
                    wait_s = max(wait_s, error.retry_after_s)
                self.num_retries += 1
                await asyncio.sleep(min(wait_s, _LONGEST_WAIT_S))
        raise AssertionError("attempts is at least 1")

    async def score(self, prompt: str, continuation: str) -> float:
        """Passed through."""
        return await self._inner.score(prompt, continuation)

    async def close(self) -> None:
        """Passed through."""
        await self._inner.close()
