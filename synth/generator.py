"""The one protocol behind every method that writes documents, and the two stages that run it.

A generator plans items for a document (a pair of entities, a style, a question), asks a language model once
for each and accepts or rejects the reply. Calls run concurrently, results come out in the order of the plan,
so the bytes on the disk do not depend on who answered first.
"""

import asyncio
import functools
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from pretrain.config import stable_seed, to_json
from synth import near_duplicates
from synth.document import Document, Failure, derive_id
from synth.llm import cached
from synth.llm.api import (
    LLM,
    BadRequest,
    LLMConfig,
    LostCall,
    OutOfBudget,
    Overloaded,
    Reply,
    Request,
    request_key,
)
from synth.llm.budget import BudgetedLLM
from synth.llm.cached import CachedLLM
from synth.llm.retrying import RetryingLLM
from synth.prompt import Prompt
from synth.stage import Shard, cache_path

JSON_ATTEMPTS = 3
PILOT = "pilot"  # the folder, beside those of the stages, in which a dry run with the real model keeps its replies
Job = Callable[[], Coroutine[Any, Any, Document | Failure]]
_SEED_LIMIT = 2**31  # some servers keep seeds in 32 bits


@dataclass(frozen=True, kw_only=True)
class Item:
    """One text to write: `key` is its place in the plan ("pair:3,17"), `parts` what it is about.

    An item that carries its text needs no call (a summary that came with the entities).
    """

    key: str
    kind: str
    parts: tuple[str, ...] = ()
    text: str | None = None


@dataclass(frozen=True, kw_only=True)
class Rejection:
    """A reply that is not taken, and why."""

    reason: str
    detail: str = ""


class Generator(Protocol):
    """A way to write documents about a document. Implementations are frozen dataclasses: their fields are identity."""

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> int: ...

    def prompts(self) -> tuple[Prompt, ...]:
        """Every prompt it uses: their hashes are part of the recipe."""
        ...

    def prepare(self, document: Document) -> list[Request]:
        """Calls to make once for a document (none, or one for each of its windows)."""
        ...

    def read_prepared(self, document: Document, replies: list[str]) -> Any | Rejection:
        """What the replies to `prepare` say, as plain JSON; a malformed reply is asked for again."""
        ...

    def plan(self, document: Document, prepared: Any, *, seed: int) -> Iterator[Item]:
        """The items in order, lazily: a smaller budget takes a prefix."""
        ...

    def request(self, document: Document, prepared: Any, item: Item) -> Request:
        """The call that writes an item."""
        ...

    def accept(self, document: Document, prepared: Any, item: Item, text: str) -> str | Rejection:
        """The text to keep. Strict: nothing is repaired."""
        ...


@dataclass(frozen=True, kw_only=True)
class Prepare:
    """Stage: ask what a generator has to know about each document; documents pass through with the answer."""

    generator: Generator
    llm: LLMConfig
    seed: int = 0
    max_attempts: int = 6
    first_wait_s: float = 1.0
    gather: bool = False

    @property
    def name(self) -> str:
        """Named after its generator."""
        return f"{self.generator.name}_prepare"

    @property
    def version(self) -> int:
        """That of its generator."""
        return self.generator.version

    @property
    def needs(self) -> tuple[str, ...]:
        """Nothing but the documents before it."""
        return ()

    def identity(self) -> Mapping[str, Any]:
        """The generator's fields, its prompts, the model and the seed."""
        return _identity(self.generator, self.llm, self.seed)

    def run(self, documents: Iterable[Document], *, shard: Shard) -> Iterator[Document | Failure]:
        """Documents in order, each with `meta["prepared"]`."""

        def work(llm: LLM) -> Iterator[Job]:
            for document in documents:
                yield functools.partial(self._prepare, llm, document, shard)

        yield from _run_calls(self.llm, shard, self.max_attempts, self.first_wait_s, work)

    async def _prepare(self, llm: LLM, document: Document, shard: Shard) -> Document | Failure:
        requests = self.generator.prepare(document)
        last = Rejection(reason="malformed")
        for attempt in range(JSON_ATTEMPTS):
            texts = []
            for number, request in enumerate(requests):
                seed = stable_seed(self.seed, self.name, document.id, number, attempt) % _SEED_LIMIT
                reply = await _ask(llm, replace(request, seed=seed), shard)
                if isinstance(reply, Rejection):
                    return _failure(document, "prepare", reply)
                texts.append(reply.text)
            prepared = self.generator.read_prepared(document, texts)
            if not isinstance(prepared, Rejection):
                return replace(document, meta={**document.meta, "prepared": prepared})
            last = prepared
            if last.reason != "malformed":
                break
        return _failure(document, "prepare", last)


@dataclass(frozen=True, kw_only=True)
class Write:
    """Stage: write the planned items of each document."""

    generator: Generator
    llm: LLMConfig
    seed: int = 0
    items_per_document: int | None = None
    max_attempts: int = 6
    first_wait_s: float = 1.0
    gather: bool = False

    @property
    def name(self) -> str:
        """That of its generator."""
        return self.generator.name

    @property
    def version(self) -> int:
        """That of its generator."""
        return self.generator.version

    @property
    def needs(self) -> tuple[str, ...]:
        """Nothing but the documents before it."""
        return ()

    def identity(self) -> Mapping[str, Any]:
        """As for `Prepare`, and how many items are taken of each plan."""
        return {
            **_identity(self.generator, self.llm, self.seed),
            "items_per_document": self.items_per_document,
        }

    def run(self, documents: Iterable[Document], *, shard: Shard) -> Iterator[Document | Failure]:
        """The written documents, in the order of documents and of their plans."""

        def work(llm: LLM) -> Iterator[Job]:
            for document in documents:
                prepared = document.meta.get("prepared")
                plan = self.generator.plan(
                    document, prepared, seed=stable_seed(self.seed, self.name, document.id)
                )
                for number, item in enumerate(plan):
                    if number == self.items_per_document:
                        break
                    yield functools.partial(self._write, llm, document, prepared, item, shard)

        yield from _run_calls(self.llm, shard, self.max_attempts, self.first_wait_s, work)

    async def _write(
        self, llm: LLM, document: Document, prepared: Any, item: Item, shard: Shard
    ) -> Document | Failure:
        meta: dict[str, Any] = {"generator": self.name, "kind": item.kind, "parts": list(item.parts)}
        if item.text is not None:
            text: str | Rejection = item.text
        else:
            request = self.generator.request(document, prepared, item)
            seed = stable_seed(self.seed, self.name, document.id, item.key, 0) % _SEED_LIMIT
            request = replace(request, seed=seed)
            reply = await _ask(llm, request, shard)
            if isinstance(reply, Rejection):
                return _failure(document, item.key, reply)
            text = self.generator.accept(document, prepared, item, reply.text)
            meta |= {
                "model": reply.model,
                "finish": reply.finish,
                "sampling": {"temperature": request.temperature, "top_p": request.top_p, "seed": seed},
                "prompt_tokens": reply.usage.prompt_tokens,
                "completion_tokens": reply.usage.completion_tokens,
                "call": request_key(llm.identity, request),
            }
        if isinstance(text, str):
            if not text.strip():
                text = Rejection(reason="empty")
            elif near_duplicates.loops(text):
                text = Rejection(reason="looping")
        if isinstance(text, Rejection):
            return _failure(document, item.key, text)
        parents = (document.id,)
        return Document(
            id=derive_id(parents, shard.recipe, item.key),
            text=text,
            parents=parents,
            made_by=shard.recipe,
            meta=meta,
        )


def _identity(generator: Generator, llm: LLMConfig, seed: int) -> dict[str, Any]:
    prompts = {prompt.name: prompt.sha256 for prompt in generator.prompts()}
    return {
        "generator": to_json(generator, identity_only=True),
        "prompts": prompts,
        "llm": dict(llm.identity()),
        "seed": seed,
    }


def _failure(document: Document, item: str, rejection: Rejection) -> Failure:
    return Failure(document=document.id, item=item, reason=rejection.reason, detail=rejection.detail)


async def _ask(llm: LLM, request: Request, shard: Shard) -> Reply | Rejection:
    """One counted call; what the model will not or cannot answer becomes a rejection."""
    try:
        reply = await llm.generate(request)
    except BadRequest as error:
        return Rejection(reason="bad_request", detail=str(error))
    except LostCall as error:
        return Rejection(reason="no_reply", detail=str(error))
    except Overloaded as error:
        return Rejection(reason="overloaded", detail=str(error))
    counts = shard.tally.counts
    counts["calls"] += 1
    counts["cached_calls"] += reply.cached
    counts["prompt_tokens"] += reply.usage.prompt_tokens
    counts["completion_tokens"] += reply.usage.completion_tokens
    if reply.finish == "refused":
        return Rejection(reason="refused", detail=reply.text[:200])
    if reply.finish == "length":
        return Rejection(reason="truncated")
    return reply


def _run_calls(
    config: LLMConfig,
    shard: Shard,
    max_attempts: int,
    first_wait_s: float,
    work: Callable[[LLM], Iterator[Job]],
) -> Iterator[Document | Failure]:
    """Run the jobs of `work` at most `concurrency` at a time and yield their results in order.

    After `OutOfBudget` no more are started, those in flight are finished, and the shard is marked partial.
    """
    own = cache_path(shard.scratch)
    folders = (own.parent, own.parent.parent / PILOT / own.parent.name)
    others = [p for folder in folders for p in sorted(folder.glob(f"*{cached.SUFFIX}")) if p != own]
    spent = cached.paid_in(own)
    budgeted = BudgetedLLM(config.build(), config, shard.budget.minus(spent))
    retrying = RetryingLLM(budgeted, attempts=max_attempts, first_wait_s=first_wait_s)
    llm = CachedLLM(retrying, config, own, read_only=others)
    loop = asyncio.new_event_loop()
    gate = asyncio.Semaphore(config.concurrency)
    waiting: deque[asyncio.Task[Document | Failure]] = deque()
    started = work(llm)

    async def gated(job: Job) -> Document | Failure:
        async with gate:
            return await job()

    def refill() -> None:
        # Beyond the gate some wait already: one slow answer at the head must not leave the model idle.
        while not shard.tally.partial and len(waiting) < 4 * config.concurrency:
            job = next(started, None)
            if job is None:
                return
            waiting.append(loop.create_task(gated(job)))

    try:
        refill()
        while waiting:
            task = waiting[0]
            loop.run_until_complete(asyncio.wait([task]))
            while waiting and waiting[0].done():
                task = waiting.popleft()
                try:
                    made = task.result()
                except OutOfBudget as error:
                    shard.tally.partial = shard.tally.partial or f"budget: {error}"
                    continue
                yield made
            refill()
    finally:
        for task in waiting:
            task.cancel()
        if waiting:
            loop.run_until_complete(asyncio.wait(waiting))
        loop.run_until_complete(llm.close())
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()
    paid = cached.paid_in(own)
    shard.tally.cost_usd = paid.cost_usd
    shard.tally.counts["paid_calls"] = paid.calls
    shard.tally.counts["paid_completion_tokens"] = paid.usage.completion_tokens
    shard.tally.counts["paid_prompt_tokens"] = paid.usage.prompt_tokens
    shard.tally.counts["lost_calls"] = paid.lost_calls
    shard.tally.counts["retries"] = retrying.num_retries
