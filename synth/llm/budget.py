"""A cap on calls, tokens and money that no interleaving of calls can pass."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pretrain.config import ConfigError
from synth.llm.api import LLM, LLMConfig, LostCall, OutOfBudget, Reply, Request, Usage, cost_usd


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Caps on paid calls; None is no cap. A share is what one shard may spend."""

    max_cost_usd: float | None = None
    max_calls: int | None = None
    max_completion_tokens: int | None = None

    def __post_init__(self):
        for name in ("max_cost_usd", "max_calls", "max_completion_tokens"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ConfigError(f"{name} must be at least 0 or none, got {value}")

    def minus(self, spent: "Account") -> "Budget":
        """What is left after `spent`, never below zero."""

        def left(cap: Any, taken: float) -> Any:
            return None if cap is None else max(cap - taken, 0)

        return Budget(
            max_cost_usd=left(self.max_cost_usd, spent.cost_usd),
            max_calls=left(self.max_calls, spent.calls + spent.lost_calls),
            max_completion_tokens=left(self.max_completion_tokens, spent.usage.completion_tokens),
        )

    def split(self, count: int) -> "Budget":
        """One of `count` equal parts, whole numbers rounded down."""
        return Budget(
            max_cost_usd=None if self.max_cost_usd is None else self.max_cost_usd / count,
            max_calls=None if self.max_calls is None else self.max_calls // count,
            max_completion_tokens=(
                None if self.max_completion_tokens is None else self.max_completion_tokens // count
            ),
        )


@dataclass(frozen=True, kw_only=True)
class Account:
    """What was spent. `lost_calls` were sent and brought no reply: the server may have charged for them, so
    tokens and money hold their worst case.
    """

    calls: int = 0
    usage: Usage = Usage()
    cost_usd: float = 0.0
    lost_calls: int = 0

    def __add__(self, other: "Account") -> "Account":
        return Account(
            calls=self.calls + other.calls,
            usage=self.usage + other.usage,
            cost_usd=self.cost_usd + other.cost_usd,
            lost_calls=self.lost_calls + other.lost_calls,
        )


class BudgetedLLM:
    """Reserves the worst case of a call before it is sent and settles the true one after."""

    def __init__(self, inner: LLM, config: LLMConfig, budget: Budget):
        self._inner = inner
        self._config = config
        self._budget = budget
        self.account = Account()
        self._reserved_calls = 0
        self._reserved_tokens = 0
        self._reserved_usd = 0.0

    @property
    def identity(self) -> Mapping[str, Any]:
        """That of the model behind it."""
        return self._inner.identity

    async def generate(self, request: Request) -> Reply:
        """Answer if the worst case fits under the cap.

        Raises:
          OutOfBudget: it does not fit, counting the calls in flight at their worst.
        """
        worst = worst_usage(request)
        worst_usd = cost_usd(self._config, worst)
        self._reserve(worst, worst_usd)
        try:
            reply = await self._inner.generate(request)
        except LostCall:
            # The server may have charged for it: the worst case counts as spent.
            self._release(worst, worst_usd)
            self.account += Account(lost_calls=1, usage=worst, cost_usd=worst_usd)
            raise
        except BaseException:
            self._release(worst, worst_usd)
            raise
        self._release(worst, worst_usd)
        self.account += Account(calls=1, usage=reply.usage, cost_usd=cost_usd(self._config, reply.usage))
        return reply

    def _reserve(self, worst: Usage, worst_usd: float) -> None:
        account, budget = self.account, self._budget
        wanted = (
            ("calls", budget.max_calls, account.calls + account.lost_calls + self._reserved_calls, 1),
            (
                "completion tokens",
                budget.max_completion_tokens,
                account.usage.completion_tokens + self._reserved_tokens,
                worst.completion_tokens,
            ),
            ("US dollars", budget.max_cost_usd, account.cost_usd + self._reserved_usd, worst_usd),
        )
        for unit, cap, taken, more in wanted:
            if cap is not None and taken + more > cap + 1e-12:
                raise OutOfBudget(
                    f"{taken:g} {unit} spent or reserved, a call may need {more:g}, the cap is {cap:g}"
                )
        self._reserved_calls += 1
        self._reserved_tokens += worst.completion_tokens
        self._reserved_usd += worst_usd

    def _release(self, worst: Usage, worst_usd: float) -> None:
        self._reserved_calls -= 1
        self._reserved_tokens -= worst.completion_tokens
        self._reserved_usd -= worst_usd

    async def score(self, prompt: str, continuation: str) -> float:
        """Passed through: scoring is for evaluation and is not capped."""
        return await self._inner.score(prompt, continuation)

    async def close(self) -> None:
        """Passed through."""
        await self._inner.close()


def worst_usage(request: Request) -> Usage:
    """An upper bound of a call: a byte-level vocabulary never makes more tokens than bytes."""
    prompt_bytes = len(request.system.encode()) + len(request.user.encode())
    return Usage(
        prompt_tokens=prompt_bytes + 64, completion_tokens=request.max_tokens
    )  # 64: the chat template
