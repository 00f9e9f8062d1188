"""A campaign's calls of language models: each reply is a row of the ledger, so a killed campaign pays for none twice.

The intent and the worst price are written before a call leaves. What was in flight at a kill stays in the account at that price
and is sent again, under the same idempotency key: a server that honors it charges once, another may charge those calls, and those
alone, a second time.
"""

import asyncio
import dataclasses
import json
from collections.abc import Sequence

from pretrain.config import ConfigError
from research_env.ledger import Ledger
from research_env.records import canonical_json, digest
from research_env.schedule import Budget
from synth.llm.api import (
    BadRequest,
    LLMConfig,
    LostCall,
    Overloaded,
    Reply,
    Request,
    Usage,
    cost_usd,
    request_key,
)
from synth.llm.api import OutOfBudget as QuotaUsedUp
from synth.llm.budget import worst_usage
from synth.llm.retrying import RetryingLLM


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """The text of a reply, or why there is none."""

    text: str
    refusal: str = ""


class Asker:
    """One model, for one campaign. Equal requests are one call, so samples differ by their seed."""

    def __init__(
        self,
        ledger: Ledger,
        config: LLMConfig,
        budget: Budget,
        *,
        attempts: int = 6,
        first_wait_s: float = 1.0,
    ):
        self._ledger, self._config, self._budget = ledger, config, budget
        self._attempts, self._first_wait_s = attempts, first_wait_s
        self.identity = canonical_json(dict(config.identity()))
        self._used: set[str] = set()

    def ask(self, requests: Sequence[Request]) -> list[Answer]:
        """Answers in order; recorded ones cost nothing, the others are asked for at once.

        Raises:
          OutOfBudget: before anything of this call is sent.
          Overloaded: the model did not answer in time; what it did answer is recorded.
        """
        keys = [request_key(self._config.identity(), request) for request in requests]
        new: dict[str, Request] = {}
        for key, request in zip(keys, requests, strict=True):
            if self._ledger.reply(key) is None:
                new[key] = request
        worst = [worst_usage(request) for request in new.values()]
        if new:
            self._budget.check(
                self._ledger.spent(),
                new_tokens=sum(usage.prompt_tokens + usage.completion_tokens for usage in worst),
                new_cost_usd=sum(cost_usd(self._config, usage) for usage in worst),
            )
            for (key, request), usage in zip(new.items(), worst, strict=True):
                self._ledger.ask(
                    key, self.identity, digest(request.system, request.user), tokens_in=usage.prompt_tokens,
                    tokens_out=usage.completion_tokens, cost_usd=cost_usd(self._config, usage),
                )  # fmt: skip
            asyncio.run(self._send(new))
        self._used |= set(keys)
        return [self._read(key) for key in keys]

    def bill(self) -> tuple[int, float]:
        """Tokens and dollars of the calls since the last bill; a replay finds the same."""
        prices = [self._ledger.price(key) for key in sorted(self._used)]
        self._used.clear()
        return sum(tokens for tokens, _ in prices), sum(usd for _, usd in prices)

    async def _send(self, requests: dict[str, Request]) -> None:
        llm = RetryingLLM(self._config.build(), attempts=self._attempts, first_wait_s=self._first_wait_s)
        slots = asyncio.Semaphore(self._config.concurrency)

        async def one(key: str, request: Request) -> None:
            async with slots:
                try:
                    reply = await llm.generate(request)
                except BadRequest as error:
                    reply = Reply(
                        text=f"the model refused the request: {error}"[:500], finish="refused", usage=Usage()
                    )
                except LostCall:
                    self._ledger.unanswered(key, was_sent=True)
                    raise
                except (Overloaded, QuotaUsedUp, ConfigError):
                    self._ledger.unanswered(key, was_sent=False)
                    raise
            usage = reply.usage
            self._ledger.answer(
                key, json.dumps([reply.text, reply.finish]), tokens_in=usage.prompt_tokens,
                tokens_out=usage.completion_tokens, cost_usd=cost_usd(self._config, usage),
            )  # fmt: skip

        try:
            done = await asyncio.gather(*(one(k, r) for k, r in requests.items()), return_exceptions=True)
        finally:
            await llm.close()
        faults = [item for item in done if isinstance(item, BaseException)]
        if faults:
            raise faults[0]

    def _read(self, key: str) -> Answer:
        reply = self._ledger.reply(key)
        assert reply is not None, "every call was answered, or an exception was raised"
        text, finish = json.loads(reply)
        return (
            Answer(text="", refusal=text[:500] or "the model refused")
            if finish == "refused"
            else Answer(text=text)
        )
