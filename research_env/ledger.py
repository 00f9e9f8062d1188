"""The campaign's memory: SQLite, one writer, the intent written before the act, every run exactly once.

A run's key is a hash of everything that decides its result, so asking twice is one row. States only go forward:
QUEUED -> RUNNING -> SEALED -> DONE. Opening a ledger takes a lock on its file and re-queues what a killed supervisor left
RUNNING; a SEALED row keeps its artifact and is judged again, not trained again. What the host failed at is re-queued as well where
no search was told of it: a baseline, a confirmation, a final score. Model replies are rows too: a reply that was recorded is never
paid again.
"""

import fcntl
import json
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pretrain.config import ConfigError
from research_env.records import Node, Result, Status, canonical_json

_SCHEMA = """
create table if not exists meta(name text primary key, value text not null);
create table if not exists nodes(id text primary key, number integer not null, body text not null, created_s real not null);
create table if not exists runs(
  key text primary key, node text not null, purpose text not null, tree text not null, seed integer not null,
  rung real not null, resource text not null, state text not null, attempts integer not null default 0,
  artifact text not null default '', result text, status text, device_s real not null default 0);
create table if not exists calls(
  key text primary key, model text not null, prompt_hash text not null, state text not null, reply text,
  tokens_in integer not null default 0, tokens_out integer not null default 0, cost_usd real not null default 0);
create table if not exists events(
  id integer primary key autoincrement, kind text not null, key text not null, detail text not null, created_s real not null);
create index if not exists events_kind on events(kind, key);
"""


class Ledger:
    """All methods may be called from several threads; only one process may hold the file."""

    def __init__(self, path: str | Path):
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._lock_file = open(f"{path}.lock", "w")  # noqa: SIM115  (held for the ledger's life)
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock_file.close()
            raise ConfigError(
                f"{path} is in use by another supervisor; end it, or use another workdir"
            ) from None
        self._mutex = threading.RLock()
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._db.execute("pragma journal_mode=wal")
        self._db.execute("pragma synchronous=full")
        self._db.executescript(_SCHEMA)
        self.recovered = self._recover()

    def close(self) -> None:
        """Close the file and let it go."""
        with self._mutex:
            self._db.close()
            self._lock_file.close()

    def _recover(self) -> int:
        with self._transaction():
            keys = [row[0] for row in self._db.execute("select key from runs where state = 'RUNNING'")]
            for key in keys:
                self._db.execute("update runs set state = 'QUEUED' where key = ?", (key,))
                self._event("requeued", key, "the supervisor ended while it ran")
            failed = self._db.execute(
                "select key from runs where state = 'DONE' and status = ? and purpose in ('baseline', 'confirm', 'final')",
                (Status.INFRA_ERROR.value,),
            ).fetchall()
            for (key,) in failed:
                self._db.execute(
                    "update runs set state = 'QUEUED', result = null, status = null where key = ?", (key,)
                )
                self._event("requeued", key, "the host failed before the restart")
            for (key,) in self._db.execute("select key from calls where state = 'ASKED'").fetchall():
                self._lose(key)
        return len(keys)

    def _lose(self, key: str) -> None:
        """A call that was sent and brought no reply keeps its worst case as its price; the key is free again."""
        number = self._db.execute("select count(*) from calls where state = 'LOST'").fetchone()[0]
        self._db.execute(
            "update calls set state = 'LOST', key = ? where key = ? and state = 'ASKED'",
            (f"{key}#{number}", key),
        )

    def _transaction(self) -> "_Transaction":
        return _Transaction(self._db, self._mutex)

    def _event(self, kind: str, key: str, detail: str) -> None:
        row = (kind, key, detail, time.time())
        self._db.execute("insert into events(kind, key, detail, created_s) values (?, ?, ?, ?)", row)

    # --- meta

    def pin(self, name: str, value: Any) -> Any:
        """The value recorded under `name` by whoever came first: `value` itself on the first call."""
        with self._transaction():
            text = canonical_json(value)
            self._db.execute("insert or ignore into meta values (?, ?)", (name, text))
            return json.loads(
                self._db.execute("select value from meta where name = ?", (name,)).fetchone()[0]
            )

    # --- nodes

    def add_node(self, node: Node) -> Node:
        """Record a node once; returns what is recorded under its id."""
        with self._transaction():
            row = self._db.execute("select body from nodes where id = ?", (node.id,)).fetchone()
            if row is not None:
                return Node.from_json(json.loads(row[0]))
            number = self._db.execute("select count(*) from nodes").fetchone()[0]
            body = canonical_json(node.to_json())
            self._db.execute("insert into nodes values (?, ?, ?, ?)", (node.id, number, body, time.time()))
            return node

    def nodes(self) -> list[Node]:
        """All nodes, in recorded order."""
        with self._mutex:
            rows = self._db.execute("select body from nodes order by number").fetchall()
        return [Node.from_json(json.loads(row[0])) for row in rows]

    def node(self, node_id: str) -> Node:
        """One node; KeyError when absent."""
        with self._mutex:
            row = self._db.execute("select body from nodes where id = ?", (node_id,)).fetchone()
        if row is None:
            raise KeyError(node_id)
        return Node.from_json(json.loads(row[0]))

    # --- runs

    def enqueue(
        self, key: str, *, node: str, purpose: str, tree: str, seed: int, rung: float, resource: str
    ) -> str:
        """Write the intent; returns the state the row has (an existing row is left as it is)."""
        with self._transaction():
            row = (key, node, purpose, tree, seed, rung, resource)
            before = self._db.total_changes
            self._db.execute(
                "insert or ignore into runs(key, node, purpose, tree, seed, rung, resource, state) values (?,?,?,?,?,?,?,'QUEUED')",
                row,
            )
            if self._db.total_changes > before:
                self._event("queued", key, purpose)
            return self._db.execute("select state from runs where key = ?", (key,)).fetchone()[0]

    def start(self, key: str) -> int:
        """QUEUED or SEALED -> RUNNING (a sealed row stays sealed); returns the number of this attempt."""
        with self._transaction():
            state, attempts = self._db.execute(
                "select state, attempts from runs where key = ?", (key,)
            ).fetchone()
            assert state in ("QUEUED", "SEALED"), f"run {key} is {state}; only one worker may have it"
            new = "RUNNING" if state == "QUEUED" else "SEALED"
            self._db.execute(
                "update runs set state = ?, attempts = ? where key = ?", (new, attempts + 1, key)
            )
            self._event("started", key, str(attempts + 1))
            return attempts + 1

    def seal(self, key: str, artifact: str) -> None:
        """RUNNING -> SEALED: from here on the training is not repeated."""
        with self._transaction():
            changed = self._db.execute(
                "update runs set state = 'SEALED', artifact = ? where key = ? and state = 'RUNNING'",
                (artifact, key),
            )
            assert changed.rowcount == 1, f"run {key} was not RUNNING"
            self._event("sealed", key, artifact)

    def requeue(self, key: str, reason: str) -> None:
        """Back to QUEUED after a fault of the host; DONE rows are never touched."""
        with self._transaction():
            self._db.execute("update runs set state = 'QUEUED' where key = ? and state != 'DONE'", (key,))
            self._event("requeued", key, reason)

    def finish(self, key: str, result: Result) -> None:
        """Any open state -> DONE, once."""
        with self._transaction():
            body = canonical_json(result.to_json())
            changed = self._db.execute(
                "update runs set state = 'DONE', result = ?, status = ?, device_s = ? where key = ? and state != 'DONE'",
                (body, result.status.value, result.device_s, key),
            )
            assert changed.rowcount == 1, f"run {key} has a result already"
            self._event("done", key, result.status.value)

    def result(self, key: str) -> Result | None:
        """The recorded result of a run, or None."""
        with self._mutex:
            row = self._db.execute(
                "select result from runs where key = ? and state = 'DONE'", (key,)
            ).fetchone()
        return None if row is None else Result.from_json(json.loads(row[0]))

    def results(self, purpose: str | None = None) -> Iterator[tuple[str, str, Result]]:
        """(node id, purpose, result) of finished runs, in the order in which they were finished."""
        with self._mutex:
            rows = self._db.execute(
                "select runs.node, runs.purpose, runs.result from events join runs on runs.key = events.key "
                "where events.kind = 'done' and runs.state = 'DONE' group by runs.key order by max(events.id)"
            ).fetchall()
        for node, found, body in rows:
            if purpose is None or found == purpose:
                yield node, found, Result.from_json(json.loads(body))

    def states(self) -> dict[str, str]:
        """State of every run by key."""
        with self._mutex:
            return dict(self._db.execute("select key, state from runs").fetchall())

    # --- money

    def reply(self, key: str) -> str | None:
        """The recorded reply of a model call, or None."""
        with self._mutex:
            row = self._db.execute(
                "select reply from calls where key = ? and state = 'DONE'", (key,)
            ).fetchone()
        return None if row is None else row[0]

    def price(self, key: str) -> tuple[int, float]:
        """Tokens and dollars of an answered call."""
        with self._mutex:
            row = self._db.execute(
                "select tokens_in + tokens_out, cost_usd from calls where key = ?", (key,)
            ).fetchone()
        return row[0], row[1]

    def ask(
        self, key: str, model: str, prompt_hash: str, *, tokens_in: int, tokens_out: int, cost_usd: float
    ) -> None:
        """Write the intent to make a call, at its worst price."""
        with self._transaction():
            self._db.execute(
                "insert into calls(key, model, prompt_hash, state, tokens_in, tokens_out, cost_usd) "
                "values (?, ?, ?, 'ASKED', ?, ?, ?)",
                (key, model, prompt_hash, tokens_in, tokens_out, cost_usd),
            )

    def answer(self, key: str, reply: str, *, tokens_in: int, tokens_out: int, cost_usd: float) -> None:
        """Record a reply and what it cost."""
        with self._transaction():
            self._db.execute(
                "update calls set state = 'DONE', reply = ?, tokens_in = ?, tokens_out = ?, cost_usd = ? where key = ?",
                (reply, tokens_in, tokens_out, cost_usd, key),
            )

    def unanswered(self, key: str, *, was_sent: bool) -> None:
        """A call that failed: one that was sent may have been charged and keeps its worst price, another is forgotten."""
        with self._transaction():
            if was_sent:
                self._lose(key)
            else:
                self._db.execute("delete from calls where key = ? and state = 'ASKED'", (key,))

    def calls(self) -> dict[str, int]:
        """How many calls are in each state: ASKED, DONE, LOST."""
        with self._mutex:
            return dict(self._db.execute("select state, count(*) from calls group by state").fetchall())

    def note(self, kind: str, key: str, detail: str) -> None:
        """Append an event of the search (a promotion, an epoch, a migration)."""
        with self._transaction():
            self._event(kind, key, detail)

    def events(self, kind: str) -> list[tuple[str, str]]:
        """(key, detail) of all events of a kind, in order."""
        with self._mutex:
            return self._db.execute(
                "select key, detail from events where kind = ? order by id", (kind,)
            ).fetchall()

    def spent(self) -> dict[str, float]:
        """Totals: runs (begun or promised, not what was refused or cached), device_s, tokens, cost_usd."""
        with self._mutex:
            runs, device_s = self._db.execute(
                "select count(*), coalesce(sum(device_s), 0) from runs where attempts > 0 or state != 'DONE'"
            ).fetchone()
            tokens, cost = self._db.execute(
                "select coalesce(sum(tokens_in + tokens_out), 0), coalesce(sum(cost_usd), 0) from calls"
            ).fetchone()
        return {"runs": runs, "device_s": device_s, "tokens": tokens, "cost_usd": cost}


class _Transaction:
    """begin immediate ... commit, under the mutex; rolled back by an exception."""

    def __init__(self, db: sqlite3.Connection, mutex: Any):
        self._db, self._mutex = db, mutex

    def __enter__(self) -> None:
        self._mutex.acquire()
        self._db.execute("begin immediate")

    def __exit__(self, kind: Any, *_: Any) -> None:
        try:
            self._db.execute("rollback" if kind else "commit")
        finally:
            self._mutex.release()


def ledger_path(workdir: str | Path) -> Path:
    """Where a campaign's ledger is."""
    return Path(os.path.join(workdir, "ledger.sqlite"))
