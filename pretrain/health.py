"""Health of a run: bad steps skipped inside jit, a ledger of what was skipped, signals, a watchdog, hashes.

The guard compares loss and gradient norm with the last accepted values, inside the jitted step, so that all
processes decide alike. Comparisons are written so that NaN falls on the skip side. A skipped step changes no
bit of parameters, optimizer state or window.
"""

import contextlib
import dataclasses
import faulthandler
import functools
import hashlib
import json
import math
import os
import signal
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int32, UInt32

from pretrain.config import ConfigError
from pretrain.rundir import append_line, finished_lines
from pretrain.sharding import in_turn

Tree = TypeVar("Tree")

EXIT_HANG = 5
EXIT_TOO_MANY_SKIPS = 6
REASONS = ("ok", "loss not finite", "gradient norm not finite", "loss spike", "gradient norm spike")


class TooManySkips(RuntimeError):
    """More steps in a row were skipped than are allowed: exit code 6."""

    exit_code = EXIT_TOO_MANY_SKIPS


# --- the guard ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class HealthConfig:
    """When a step is bad, and when a run is."""

    window_steps: int = 128  # accepted steps that a new value is compared with
    min_accepted: int = 64  # spikes are judged from this many accepted steps on; non-finite values always
    num_sigmas: float = 6.0
    min_relative_sigma: float = 1e-3  # a flat window has sigma 0, and rounding would be a spike
    max_consecutive_skips: int = 8  # one more ends the run with exit code 6

    def __post_init__(self) -> None:
        faults = []
        if not 1 <= self.min_accepted <= self.window_steps:
            faults.append(
                f"min_accepted must lie in [1, window_steps={self.window_steps}], got {self.min_accepted}"
            )
        if not self.num_sigmas > 0:
            faults.append(f"num_sigmas must be positive, got {self.num_sigmas}")
        if not self.min_relative_sigma >= 0:
            faults.append(f"min_relative_sigma must not be negative, got {self.min_relative_sigma}")
        if self.max_consecutive_skips < 1:
            faults.append(f"max_consecutive_skips must be at least 1, got {self.max_consecutive_skips}")
        if faults:
            raise ValueError("\n".join(faults))


def init_health(config: HealthConfig = HealthConfig()) -> dict[str, Array]:
    """The guard's state: windows of accepted values, counters, the last decision. A plain dict of arrays."""
    return {
        "loss_window": jnp.zeros(config.window_steps, jnp.float32),
        "norm_window": jnp.zeros(config.window_steps, jnp.float32),
        "accepted": jnp.zeros((), jnp.int32),  # into the windows, since they began
        "skipped": jnp.zeros((), jnp.int32),
        "consecutive_skips": jnp.zeros((), jnp.int32),
        "reason": jnp.zeros((), jnp.int32),  # index into REASONS
    }


def guard(
    health: Mapping[str, Array],
    loss: Float[Array, ""],
    grad_norm: Float[Array, ""],
    config: HealthConfig = HealthConfig(),
) -> tuple[dict[str, Array], Bool[Array, ""]]:
    """Judge a step: (new health state, ok). Pure; call it inside jit with the *global* loss and norm.

    ok is False when either value is not finite or, from the `min_accepted`-th accepted step on, above mean +
    `num_sigmas` standard deviations of the window. A rejected value does not enter the window.
    """
    loss, grad_norm = loss.astype(jnp.float32), grad_norm.astype(jnp.float32)
    accepted = health["accepted"]
    slots = jnp.arange(config.window_steps, dtype=jnp.int32)
    filled = slots < accepted
    loss_ok = loss <= _limit(health["loss_window"], filled, accepted, config)
    norm_ok = grad_norm <= _limit(health["norm_window"], filled, accepted, config)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    ok = finite & loss_ok & norm_ok

    reason = jnp.where(ok, 0, jnp.where(loss_ok, 4, 3))
    reason = jnp.where(jnp.isfinite(grad_norm), reason, 2)
    reason = jnp.where(jnp.isfinite(loss), reason, 1).astype(jnp.int32)
    here = (slots == accepted % config.window_steps) & ok
    skip = (~ok).astype(jnp.int32)
    return {
        "loss_window": jnp.where(here, loss, health["loss_window"]),
        "norm_window": jnp.where(here, grad_norm, health["norm_window"]),
        "accepted": accepted + (1 - skip),
        "skipped": health["skipped"] + skip,
        "consecutive_skips": (health["consecutive_skips"] + skip) * skip,
        "reason": reason,
    }, ok


def refused(health: Mapping[str, Array], reason: Int32[Array, ""]) -> dict[str, Array]:
    """What `guard` leaves of a step that it refuses for `reason`, an index into REASONS."""
    return {
        **health,
        "skipped": health["skipped"] + 1,
        "consecutive_skips": health["consecutive_skips"] + 1,
        "reason": reason,
    }


def renewed(
    health: Mapping[str, Array], step: UInt32[Array, ""], new_data_steps: Sequence[int]
) -> dict[str, Array]:
    """The guard's state before a step; where the data changes its kind the windows begin anew.

    What was usual before says nothing about what is usual then: without this a mixture of another difficulty is one
    long spike, and ends the run.
    """
    if not new_data_steps:
        return dict(health)
    begins = jnp.any(step == jnp.asarray(new_data_steps, step.dtype))
    return {**health, "accepted": jnp.where(begins, 0, health["accepted"])}


def _limit(window: Array, filled: Array, accepted: Array, config: HealthConfig) -> Array:
    """The largest acceptable value; infinity while the window is too short to judge."""
    count = jnp.maximum(jnp.minimum(accepted, config.window_steps), 1).astype(jnp.float32)
    mean = jnp.sum(jnp.where(filled, window, 0.0)) / count
    variance = jnp.sum(jnp.where(filled, (window - mean) ** 2, 0.0)) / count
    sigma = jnp.maximum(jnp.sqrt(variance), config.min_relative_sigma * jnp.abs(mean))
    return jnp.where(accepted >= config.min_accepted, mean + config.num_sigmas * sigma, jnp.inf)


def keep_if(ok: Bool[Array, ""], new: Tree, old: Tree) -> Tree:
    """`new` where ok, else `old` bit for bit, leaf by leaf (counters of the optimizer included)."""
    return jax.tree.map(lambda n, o: jnp.where(ok, n, o), new, old)


# --- the ledger --------------------------------------------------------------------------------------


class Ledger:
    """What was skipped or quarantined, in order. An item of every checkpoint, and a file that is ahead of them.

    An entry is a dict with "event" and "step"; values that JSON lacks (nan, inf) are written as text. With `path` it
    is on the disk when it has been added, so that a run which dies before its next checkpoint finds it again.
    """

    def __init__(self, entries: Sequence[Mapping[str, Any]] = (), path: Path | None = None):
        self.entries: list[dict[str, Any]] = [dict(entry) for entry in entries]
        self._path = path

    def resumed(
        self, written: Sequence[Mapping[str, Any]], step: int, path: Path | None
    ) -> tuple["Ledger", dict[int, dict[str, Any]]]:
        """This ledger, that of a checkpoint of `step`, with what the file at `path` holds beyond it, `written`.

        The second value are the skips of later steps, by step: they are to be skipped again. None is in the ledger
        yet. What the file lacks (the ledger of a trunk, a quarantine on the way here) is added to it.
        """
        beyond = [dict(entry) for entry in written if entry not in self.entries]
        ahead = {e["step"]: e for e in beyond if e["event"] == "skip" and e["step"] > step}
        if path is not None:
            for entry in self.entries:
                if entry not in written:
                    append_line(path, json.dumps(entry, allow_nan=False))
        rest = [entry for entry in beyond if entry["step"] not in ahead or entry["event"] != "skip"]
        return Ledger([*self.entries, *rest], path), ahead

    def skip(
        self,
        step: int,
        *,
        loss: float,
        grad_norm: float,
        reason: str,
        rows: Sequence[Any] = (),
    ) -> dict[str, Any]:
        """Record that the update of `step` was not applied; `rows` are the (source, row) pairs of its batch."""
        entry = {"event": "skip", "step": step, "reason": reason, "loss": loss, "grad_norm": grad_norm}
        return self.add(**entry, rows=list(rows))

    def add(self, *, event: str, step: int, **fields: Any) -> dict[str, Any]:
        """Append an entry (skip, quarantine, ...) and return it as it will be written."""
        entry = _plain({"event": event, "step": step, **fields})
        if self._path is not None:
            append_line(self._path, json.dumps(entry, allow_nan=False))
        self.entries.append(entry)
        return entry

    def select(self, event: str) -> list[dict[str, Any]]:
        """All entries of one kind, oldest first."""
        return [entry for entry in self.entries if entry["event"] == event]

    @property
    def skipped_steps(self) -> list[int]:
        return [entry["step"] for entry in self.select("skip")]


def read_ledger(path: Path) -> list[dict[str, Any]]:
    """The entries of a ledger's file; none where there is no file.

    Raises:
      ConfigError: a finished line is no entry (names file and line).
    """
    entries = []
    for number, line in enumerate(finished_lines(path), start=1):
        try:
            entry = json.loads(line)
            if not isinstance(entry["event"], str) or not isinstance(entry["step"], int):
                raise ValueError("event must be text, step an integer")
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{path}:{number} must be a JSON object with an event and a step, got {line[:60]!r}; remove the line"
            ) from error
        entries.append(entry)
    return entries


def _plain(value: Any) -> Any:
    """The value as strict JSON: numpy scalars as numbers, non-finite numbers as text, tuples as lists."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, (np.ndarray, np.generic, jax.Array)):
        return _plain(np.asarray(value).tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


# --- hashes ------------------------------------------------------------------------------------------


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves by dotted path (`blocks.attention.q`), sorted by path."""
    named = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = ".".join(_part(key) for key in path)
        assert name not in named, f"two leaves are both called {name!r}"
        named[name] = leaf
    return dict(sorted(named.items()))


def _part(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    raise AssertionError(f"a tree path holds keys, names and indices, got {key!r}")


def _mix(x: Array) -> Array:
    """A bijection of 32-bit words that spreads every bit (the finalizer of MurmurHash3)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def leaf_hash(x: Array) -> UInt32[Array, "2"]:
    """64 bits over an array's values and their places; equal on every mesh, because integer sums commute.

    Lane 0 is a sum of a bijection of each word, so a change in one word always shows. Traceable; on sharded
    arrays of explicit or automatic meshes the result is replicated.
    """
    x = jnp.asarray(x)
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    sharding = jax.typeof(x).sharding
    place = jnp.zeros((), jnp.uint32)
    stride = 1
    for dim in reversed(range(x.ndim)):
        count = lax.broadcasted_iota(jnp.uint32, x.shape, dim, out_sharding=sharding)
        place = place + count * jnp.uint32(stride & 0xFFFFFFFF)
        stride *= x.shape[dim]
    place = place * jnp.uint32(0x9E3779B1)
    width = x.dtype.itemsize
    if width == 8:  # one word becomes two, on a new last dimension
        words = lax.bitcast_convert_type(x, jnp.uint32)
        hashed = _mix(words[..., 0] + place) + _mix(words[..., 1] ^ _mix(place + jnp.uint32(1)))
    else:
        unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[width]
        hashed = _mix(lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32) + place)
    lane0 = jnp.sum(hashed, dtype=jnp.uint32)
    lane1 = jnp.sum(hashed * (hashed | jnp.uint32(1)), dtype=jnp.uint32)
    return jnp.stack([lane0, lane1])


# Compiled once per shape, dtype and sharding; a parameter and its two moments share one.
_hash_leaf = jax.jit(leaf_hash)


def hash_leaves(tree: Any) -> list[UInt32[Array, "2"]]:
    """`leaf_hash` of every leaf, in the order of `named_leaves`. Dispatched like any step: read it later."""
    return [in_turn(_hash_leaf(leaf)) for leaf in named_leaves(tree).values()]


def hash_text(pair: Any) -> str:
    """A leaf hash as 16 hexadecimal digits."""
    lane0, lane1 = (int(word) for word in np.asarray(pair))
    return f"{lane0:08x}{lane1:08x}"


def fingerprint_of_hashes(names: Sequence[str], hashes: Any) -> str:
    """One line (16 hex digits) for a tree: two runs with the same config must log the same lines."""
    text = "\n".join(f"{name} {hash_text(pair)}" for name, pair in zip(names, hashes, strict=True))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def tree_fingerprint(tree: Any) -> str:
    """`fingerprint_of_hashes` of a live tree; waits for the device."""
    return fingerprint_of_hashes(list(named_leaves(tree)), hash_leaves(tree))


# --- signals -----------------------------------------------------------------------------------------


class StopSignal:
    """`with StopSignal() as stop:` the first SIGTERM or SIGINT sets `stop.requested`, a later SIGINT kills.

    A later SIGTERM is only answered: launchers send it to a group and to its members, or again after a while, and
    would kill the very save that the first one asked for. Whoever loses patience sends SIGKILL; a person at the
    terminal presses Ctrl-C. Only the main thread may enter it. The former handlers come back on exit.
    """

    signals = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.received: str | None = None
        self._answer: Bool[Array, ""] | None = None
        self._former: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        self._former = {number: signal.signal(number, self._handle) for number in self.signals}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.received is None:
            self.received = name
            impatient = "once more" if number == signal.SIGINT else "SIGINT"
            text = f"{name}: saving and stopping; {impatient} to stop at once"
        elif number == signal.SIGINT:  # written files are atomic: dying here loses nothing that was saved
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
            return
        else:
            text = f"{name} again: still saving"
        os.write(2, f"\n{text}\n".encode())

    @property
    def requested(self) -> bool:
        """This process was asked to stop."""
        return self.received is not None

    def requested_anywhere(self) -> bool:
        """Any process was asked to stop; all processes call it before each step and get the same answer.

        With several processes it is the answer to the question of the call before, which travelled to the devices ahead
        of the step that has since been waited for: asking costs no wait of its own, and all stop a step later.
        """
        if jax.process_count() == 1:
            return self.requested
        answer, self._answer = self._answer, any_process(self.requested)
        return answer is not None and bool(np.asarray(answer))


def any_process(flag: bool) -> Bool[Array, ""]:
    """Whether `flag` is set in any process; dispatched like a step, so that only reading it waits for the others."""
    # On a torus jax lists devices by their place, not by their process.
    by_process = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    devices = np.array(by_process).reshape(jax.process_count(), jax.local_device_count())
    mesh = Mesh(devices, ("process", "local"))
    flags = multihost_utils.host_local_array_to_global_array(
        np.asarray([flag]), mesh, PartitionSpec("process")
    )
    return in_turn(_any_on(mesh)(flags))


@functools.cache
def _any_on(mesh: Mesh) -> Any:
    """Traced once a run and not at every step."""
    return jax.jit(jnp.any, out_shardings=NamedSharding(mesh, PartitionSpec()))


# --- the watchdog ------------------------------------------------------------------------------------


class Watchdog:
    """A thread that ends a hung process: no step for max(min_limit_s, factor x median step) dumps every stack
    to stderr and `report`, then exits with code 5, for the launcher to start it again. Until a step has been timed the
    limit is `startup_limit_s`.

    Call `beat(step)` after each step and wrap work that may rightly take longer in `patience(seconds)`.
    """

    def __init__(
        self,
        *,
        min_limit_s: float = 120.0,
        factor: float = 20.0,
        startup_limit_s: float = 3600.0,  # compiling a large model for the first time
        report: Path | None = None,
    ):
        self._min_limit_s, self._factor, self._startup_limit_s = min_limit_s, factor, startup_limit_s
        self._report = report
        self._step: int | None = None
        self._durations_s: list[float] = []
        self._patience_s = 0.0
        self._interrupted = False  # the running interval held other work than a step
        self._tick_s = min(1.0, min_limit_s / 8)
        self._stopped_s = 0.0
        self._last = self._now()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._last = self._now()
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()

    def beat(self, step: int) -> None:
        """`step` is done."""
        now = self._now()
        if self._step is not None and not self._interrupted:
            self._durations_s = [*self._durations_s[-63:], now - self._last]
        self._step, self._last, self._interrupted = step, now, False

    @contextlib.contextmanager
    def patience(self, limit_s: float) -> Iterator[None]:
        """Allow `limit_s` seconds from now for work that is not a step (evaluation, a save that must finish)."""
        former, self._patience_s = self._patience_s, limit_s
        self._last, self._interrupted = self._now(), True
        try:
            yield
        finally:
            self._patience_s = former
            self._last = self._now()

    @property
    def limit_s(self) -> float:
        """Seconds of silence after which the process ends."""
        median_s = statistics.median(self._durations_s) if self._durations_s else 0.0
        limit_s = max(self._min_limit_s, self._factor * median_s, self._patience_s)
        # Until a step has been timed nobody knows how long one takes: those that compile are not.
        return limit_s if self._durations_s else max(limit_s, self._startup_limit_s)

    def _now(self) -> float:
        """Seconds on a clock that stands still while the process is stopped."""
        return time.monotonic() - self._stopped_s

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._stop.wait(self._tick_s):
            # A process that was stopped (Ctrl-Z, a suspended laptop) did not hang: this thread slept as well.
            gap_s = time.monotonic() - before
            if gap_s > 20 * self._tick_s:
                self._stopped_s += gap_s
            before = time.monotonic()
            silent_s = self._now() - self._last
            if silent_s > self.limit_s:
                self._end(silent_s)

    def _end(self, silent_s: float) -> None:
        where = "before the first step" if self._step is None else f"after step {self._step}"
        text = f"hang: no progress for {silent_s:.0f} s {where}, limit {self.limit_s:.0f} s; stacks of all threads:\n"
        os.write(2, text.encode())
        faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
        if self._report is not None:
            with contextlib.suppress(OSError), open(self._report, "w") as file:  # the exit matters more
                file.write(text)
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        os._exit(EXIT_HANG)
