"""Replies kept in sqlite by hash(model, request): a crash pays for nothing twice, a rerun gives the same bytes."""

import asyncio
import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pretrain.config import ConfigError
from synth.llm.api import (
    LLM,
    BadRequest,
    LLMConfig,
    LostCall,
    OutOfBudget,
    Overloaded,
    Reply,
    Request,
    Usage,
    cost_usd,
    request_key,
)
from synth.llm.budget import Account, worst_usage

SUFFIX = ".replies.sqlite"
_SCHEMA = """
CREATE TABLE IF NOT EXISTS replies (
  key TEXT PRIMARY KEY, text TEXT NOT NULL, finish TEXT NOT NULL, model TEXT NOT NULL,
  prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL, cost_usd REAL NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS sent (
  key TEXT PRIMARY KEY, prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL, cost_usd REAL NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS lost (prompt_tokens INTEGER, completion_tokens INTEGER, cost_usd REAL);
"""
_SPENT = "SELECT count(*), total(prompt_tokens), total(completion_tokens), total(cost_usd) FROM "
_GROUP_COMMIT_S = 0.002


class CachedLLM:
    """Looks a call up, else makes it and commits the reply before anybody sees it.

    One file per shard and one writer per file, with a rollback journal: safe on network file systems. Calls
    that finish together are committed together. `sent` notes every call before it leaves, so that after a
    kill those that were in flight, which alone may have to be paid again, count as lost at their worst case.
    """

    def __init__(self, inner: LLM, config: LLMConfig, path: Path, *, read_only: Sequence[Path] = ()):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._inner = inner
        self._config = config
        self._identity = dict(inner.identity)
        self._db = sqlite3.connect(path, isolation_level=None)
        self._db.executescript("PRAGMA journal_mode=TRUNCATE; PRAGMA synchronous=NORMAL;" + _SCHEMA)
        self._db.executescript(
            "BEGIN; INSERT INTO lost SELECT prompt_tokens, completion_tokens, cost_usd FROM sent "
            "WHERE key NOT IN (SELECT key FROM replies); DELETE FROM sent; COMMIT;"
        )
        self._others = [sqlite3.connect(f"file:{other}?mode=rw", uri=True) for other in read_only]
        self._intents: list[tuple[Any, ...]] = []
        self._rows: list[tuple[Any, ...]] = []
        self._never_charged: list[tuple[str]] = []
        self._commit: asyncio.Task[None] | None = None
        self._in_flight: dict[str, asyncio.Future[Reply]] = {}
        self.num_calls = 0
        self.num_hits = 0

    @property
    def identity(self) -> Mapping[str, Any]:
        """That of the model behind it."""
        return self._identity

    async def generate(self, request: Request) -> Reply:
        """The kept reply (`cached=True`), or a new one that is on the disk before this returns."""
        key = request_key(self._identity, request)
        while True:
            kept = self._look_up(key)
            if kept is not None:
                self.num_hits += 1
                return kept
            twin = self._in_flight.get(key)
            if twin is None:
                break
            await asyncio.wait([twin])  # the same call is in flight: one of them is enough
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._in_flight[key] = future
        try:
            worst = worst_usage(request)
            price = cost_usd(self._config, worst)
            self._intents.append((key, worst.prompt_tokens, worst.completion_tokens, price))
            await self._write_soon()
            try:
                reply = await self._inner.generate(request)
            except LostCall:
                raise  # it may have been charged: the note of it stays
            except (Overloaded, BadRequest, OutOfBudget, ConfigError):
                self._never_charged.append((key,))
                await self._write_soon()
                raise
            self.num_calls += 1
            usage, price = reply.usage, cost_usd(self._config, reply.usage)
            self._rows.append(
                (
                    key,
                    reply.text,
                    reply.finish,
                    reply.model,
                    usage.prompt_tokens,
                    usage.completion_tokens,
                    price,
                )
            )
            await self._write_soon()
            return reply
        finally:
            del self._in_flight[key]
            future.cancel()

    def _look_up(self, key: str) -> Reply | None:
        query = "SELECT text, finish, model, prompt_tokens, completion_tokens FROM replies WHERE key = ?"
        for db in (self._db, *self._others):
            row = db.execute(query, (key,)).fetchone()
            if row is not None:
                usage = Usage(prompt_tokens=row[3], completion_tokens=row[4])
                return Reply(text=row[0], finish=row[1], model=row[2], usage=usage, cached=True)
        return None

    async def _write_soon(self) -> None:
        if self._commit is None:
            self._commit = asyncio.create_task(self._write_group())
        await asyncio.shield(self._commit)

    async def _write_group(self) -> None:
        await asyncio.sleep(_GROUP_COMMIT_S)
        intents, self._intents = self._intents, []
        rows, self._rows = self._rows, []
        never_charged, self._never_charged = self._never_charged, []
        self._commit = None
        self._db.execute("BEGIN IMMEDIATE")
        self._db.executemany("INSERT OR IGNORE INTO sent VALUES (?, ?, ?, ?)", intents)
        self._db.executemany("DELETE FROM sent WHERE key = ?", never_charged)
        self._db.executemany("INSERT OR REPLACE INTO replies VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
        self._db.execute("COMMIT")

    async def score(self, prompt: str, continuation: str) -> float:
        """Passed through."""
        return await self._inner.score(prompt, continuation)

    async def close(self) -> None:
        """Close the files and the model behind."""
        if self._commit is not None:
            await self._commit
        for db in (self._db, *self._others):
            db.close()
        await self._inner.close()


def paid_in(path: Path) -> Account:
    """What the replies kept in `path` were charged, ever, and what interrupted calls may have been."""
    if not path.is_file():
        return Account()
    db = sqlite3.connect(
        f"file:{path}?mode=rw", uri=True
    )  # not "ro": a kill may have left a journal to roll back
    try:
        if db.execute("SELECT count(*) FROM sqlite_master WHERE name = 'lost'").fetchone()[0] == 0:
            return Account()  # killed before its tables were made
        kept = db.execute(_SPENT + "replies").fetchone()
        lost = db.execute(_SPENT + "lost").fetchone()
        sent = db.execute(_SPENT + "sent WHERE key NOT IN (SELECT key FROM replies)").fetchone()
    finally:
        db.close()
    account = Account()
    for (count, prompt, completion, price), is_lost in ((kept, False), (lost, True), (sent, True)):
        usage = Usage(prompt_tokens=int(prompt), completion_tokens=int(completion))
        calls, lost_calls = (0, count) if is_lost else (count, 0)
        account += Account(calls=calls, lost_calls=lost_calls, usage=usage, cost_usd=price)
    return account
