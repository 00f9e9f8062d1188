"""Checkpoints one can trust: Orbax writes them, a manifest of content hashes written last makes them count.

    <folder>/<step>/  params/ opt_state/ health/    arrays, float32 and all, one flat dict of dotted names each
                      data/ ledger/ meta/           JSON: next step and data fingerprint; skips; config and versions
                      manifest.json                 every leaf with shape, dtype, 64-bit hash; every file with its size

A step without manifest does not exist. A step that contradicts its manifest, or that the disk cannot give back, is
passed over: the next older one is taken, and then the damaged one is renamed `<step>.bad`, never deleted. What is the
fault of this machine and not of the files (too many open files, no permission) is no damage, nor is another config,
other data or another model shape: they stop with a ConfigError and change nothing. Processes agree on what they found
before they go on. Leaf hashes are taken from the live state, so they also cover serialization. This is the only file
that knows Orbax.
"""

import concurrent.futures
import contextlib
import dataclasses
import errno
import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, NamedSharding, SingleDeviceSharding

from pretrain import config as config_lib
from pretrain.config import ConfigError, local
from pretrain.distributed import same_everywhere, texts_of_all
from pretrain.health import Ledger, hash_leaves, hash_text, named_leaves
from pretrain.rundir import file_sha256, storage_errors, write_atomic
from pretrain.sharding import host_blocks

State = TypeVar("State")
Result = TypeVar("Result")

MANIFEST = "manifest.json"
_FORMAT = 1
_ARRAY_ITEMS = ("params", "opt_state", "health")
_JSON_ITEMS = ("data", "ledger", "meta")
_STEP_FOLDER = re.compile(r"\d+")
_TEMPORARY = "*.orbax-checkpoint-tmp*"
# Files above this size are not hashed as files (a pod writes terabytes); their content is in the leaf hashes.
_HASHED_FILE_BYTES = 64 << 20
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
# What Orbax and tensorstore raise on damaged files and bad storage.
_STORAGE_KINDS = (OSError, ValueError, RuntimeError, KeyError, TypeError, EOFError)


# What says nothing about a file: the machine could not read it, now or as this user.
_MACHINE_FAULTS = {
    errno.ENFILE: "this machine has too many open files; close some",  # before EMFILE, whose text it begins with
    errno.EMFILE: "raise `ulimit -n`",
    errno.EACCES: "this user may not read it; change its permissions or be its owner",
    errno.EPERM: "this user may not read it; change its permissions or be its owner",
    errno.ENOMEM: "this machine has too little memory free",
    errno.EAGAIN: "run the same command again",
    errno.EINTR: "run the same command again",
    errno.ESTALE: "the network file system has lost it; mount it anew, then run the same command again",
    errno.ETIMEDOUT: "the storage does not answer; run the same command again when it does",
    errno.EHOSTDOWN: "the storage does not answer; run the same command again when it does",
    errno.EHOSTUNREACH: "the storage does not answer; run the same command again when it does",
    errno.ENOTCONN: "the storage does not answer; run the same command again when it does",
}
# The first process has seen the file, so where another does not see it the folder is not the same.
_UNSEEN = {
    errno.ENOENT: "all processes must see the same run.workdir; mount it, then run the same command again"
}


class Damaged(Exception):
    """A checkpoint contradicts its manifest, or the disk cannot give it back."""


class Unreadable(ConfigError):
    """This machine cannot read a checkpoint, which says nothing about the checkpoint."""


class NoCheckpoint(RuntimeError):
    """A checkpoint was demanded and none exists: exit code 3."""

    exit_code = 3


class AllCheckpointsBad(RuntimeError):
    """Checkpoints exist and none can be read: exit code 4."""

    exit_code = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointPolicy:
    """When to save and what to keep. The last step and a preemption are saved by the caller in any case."""

    every_steps: int | None = local(None)
    every_s: float | None = local(600.0)
    keep_last: int = local(2)
    keep_every_steps: int | None = local(None)  # saved and kept for good
    keep_steps: tuple[int, ...] = local(())  # likewise, by number: where other runs branch off

    def __post_init__(self) -> None:
        faults = []
        for name in ("every_steps", "every_s", "keep_every_steps"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                faults.append(f"{name} must be positive or none, got {value}")
        if self.keep_last < 1:
            faults.append(f"keep_last must be at least 1, got {self.keep_last}")
        if faults:
            raise ValueError("\n".join(faults))


def _warn(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Checkpointer:
    """Saves and restores the train state of one run; the only writer of `folder`.

    `config_json` is the whole `to_json(config)`. A state is a dataclass with the fields step, params,
    opt_state and health. In a multi-process run every process makes the same calls.
    """

    def __init__(
        self,
        folder: str | Path,
        config_json: Mapping[str, Any],
        data_fingerprint: str,
        policy: CheckpointPolicy = CheckpointPolicy(),
        log: Callable[[str], None] = _warn,
    ):
        self._folder = Path(folder).absolute()
        self._config_json = dict(config_json)
        self._identity = config_lib.to_json(config_lib.from_json(config_json), identity_only=True)
        self._versions = {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}}
        self._data_fingerprint = data_fingerprint
        self._policy = policy
        self._log = log
        self._writer = jax.process_index() == 0
        logging.getLogger("absl").addFilter(_not_orbax)
        self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        self._background = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: concurrent.futures.Future[None] | None = None
        self._last_save = time.monotonic()
        with storage_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)

    def due(self, step: int) -> bool:
        """The policy wants a save after `step` completed steps. All processes get the answer of the first."""
        policy = self._policy
        if step in policy.keep_steps:
            return True
        if any(n is not None and step % n == 0 for n in (policy.every_steps, policy.keep_every_steps)):
            return True
        if policy.every_s is None:
            return False
        late = time.monotonic() - self._last_save >= policy.every_s
        if jax.process_count() == 1:
            return late
        # Clocks differ, so the first process decides; asking costs a round trip, hence not at every step.
        return step % 10 == 0 and bool(multihost_utils.broadcast_one_to_all(np.asarray(late)))

    def save(self, state: Any, step: int, extras: Mapping[str, Any] | None = None) -> float:
        """Start saving `state` after `step` completed steps; return the seconds the caller was held up.

        `extras` may hold "ledger" (a Ledger), "data" and "meta" (dicts of JSON values). The state may be
        donated to the next step at once. A step that is already saved is left alone.

        Raises:
          ConfigError: the storage refused this save or the one before; what it had written is removed.
        """
        began = time.perf_counter()
        extras = dict(extras or {})
        assert set(extras) <= set(_JSON_ITEMS), f"extras are {_JSON_ITEMS}, got {sorted(extras)}"
        self.wait()
        self._last_save = time.monotonic()
        if self._writer:
            self._remove_unfinished(step)
        # The first process decides: it alone writes manifests, later than the others see their save committed.
        if same_everywhere([int(self._has_manifest(step))])[0]:
            return time.perf_counter() - began
        groups = _groups(state)
        ledger = extras.get("ledger", Ledger())
        items: dict[str, Any] = {
            "data": {"step": step, "fingerprint": self._data_fingerprint, **extras.get("data", {})},
            "ledger": {"entries": ledger.entries},
            "meta": self._meta(step, extras.get("meta", {})),
        }
        items = json.loads(json.dumps(items, allow_nan=False))  # a copy, and proof that it is JSON
        path = self._path(step)
        arguments = {name: ocp.args.PyTreeSave(group) for name, group in groups.items()}
        arguments |= {name: ocp.args.JsonSave(item) for name, item in items.items()}
        with storage_errors(path, _STORAGE_KINDS), self._abandoned_on_error(step):
            self._orbax.save(path, args=ocp.args.Composite(**arguments))
        hashes = hash_leaves(groups)  # dispatched before the caller can donate the buffers
        self._pending = self._background.submit(self._finish, step, _describe(groups), hashes, items)
        return time.perf_counter() - began

    def poll(self) -> None:
        """Raise what a save in the background ran into, without waiting. Call it once per step."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Wait until the last save is on the disk with its manifest.

        Raises:
          ConfigError: the storage refused it.
        """
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def close(self) -> None:
        """Wait, then free Orbax's threads."""
        try:
            self.wait()
        finally:
            self._background.shutdown()
            self._orbax.close()

    def steps(self) -> list[int]:
        """All steps with a manifest, oldest first."""
        return saved_steps(self._folder)

    def latest_step(self) -> int | None:
        """The newest step with a manifest. It has not been verified."""
        return max(self.steps(), default=None)

    def restore_latest(self, abstract_state: State) -> tuple[State, int, Ledger] | None:
        """The newest checkpoint that keeps its promises: (state, completed steps, ledger); None if none exists.

        `abstract_state` gives shapes, dtypes and shardings (ShapeDtypeStruct or arrays): any mesh will do,
        whichever wrote it. Damaged steps on the way are renamed `<step>.bad` once an older one is restored, and
        noted in the ledger.

        Raises:
          ConfigError: the newest readable checkpoint belongs to another config, other data or another model, or
            this machine cannot read it (Unreadable).
          AllCheckpointsBad: checkpoints exist and every one is damaged; none is renamed.
        """
        self.wait()
        if self._writer:
            try:
                self._remove_temporaries()
            except OSError as error:  # in the way of nothing: Orbax takes other names
                self._log(f"checkpoint: an unfinished step stays for now: {error}")
        bad: list[tuple[int, str]] = []
        for step in reversed(same_everywhere(self.steps())):
            try:
                state, items = self._restore(self._path(step), abstract_state)
            except Damaged as error:
                bad.append((step, str(error)))
                continue
            ledger = Ledger(items["ledger"]["entries"])
            # Only now that an older one has proved that checkpoints can be read here.
            for bad_step, why in reversed(bad):
                self._quarantine(bad_step, why)
                ledger.add(event="quarantine", step=bad_step, reason=why, restored_step=step)
            if bad:
                self._log(f"checkpoint: step {step} restored; newer ones are damaged: {_list(bad)}")
            return state, step, ledger
        quarantined = sorted(p.name for p in self._folder.glob("*.bad*")) if self._folder.is_dir() else []
        if bad or same_everywhere([len(quarantined)])[0]:
            raise AllCheckpointsBad(
                f"a run resumes from a readable checkpoint, and all in {self._folder} are damaged"
                f" ({_list(bad) or ', '.join(quarantined)}); to start from step 0 move that folder away"
            )
        return None

    def restore_trunk(
        self, path: Path, abstract_state: State, *, may_differ: Sequence[str]
    ) -> tuple[State, Ledger, dict[str, Any]]:
        """State, ledger and identity of one saved step of another run, which may differ in these fields only.

        Raises:
          ConfigError: it differs in more, reads other data, or cannot be read here.
          AllCheckpointsBad: the step is damaged or not there.
        """
        try:
            state, items = self._restore(path, abstract_state, may_differ)
        except Damaged as error:
            raise AllCheckpointsBad(
                f"a branch starts from a readable checkpoint, got {path}: {error}"
            ) from error
        return state, Ledger(items["ledger"]["entries"]), items["meta"]["identity"]

    def _restore(
        self, path: Path, abstract_state: State, may_differ: Sequence[str] = ()
    ) -> tuple[State, dict[str, Any]]:
        """State and JSON items of one step; all processes get them, or all raise the same."""
        groups = jax.tree.map(_abstract, _groups(abstract_state))

        def inspect() -> tuple[dict[str, Any], dict[str, Any]]:
            manifest = read_manifest(path)
            if self._writer:  # one process reads it all; the leaf hashes below are compared everywhere
                _check_files(path, manifest)
            items = {name: _read_json_item(path, name) for name in _JSON_ITEMS}
            self._check_identity(items, may_differ)
            _check_leaves(path, manifest, groups)
            return manifest, items

        manifest, items = _agreed(inspect)
        loaded = _load(path, manifest, groups)
        values = {f"{item}.{name}": leaf for item, group in loaded.items() for name, leaf in group.items()}
        fields = {
            "params": _fill(abstract_state.params, values, "params"),  # type: ignore[attr-defined]
            "opt_state": _fill(abstract_state.opt_state, values, "opt_state"),  # type: ignore[attr-defined]
            "health": _fill(abstract_state.health, values, "health.health"),  # type: ignore[attr-defined]
            "step": values["health.step"],
        }
        return dataclasses.replace(abstract_state, **fields), items  # type: ignore[type-var]

    def _check_identity(self, items: Mapping[str, Any], may_differ: Sequence[str]) -> None:
        """Raise ConfigError naming the fields that differ from those of the checkpoint."""
        remedy = "set it back, or start a new run in another run.workdir"
        step, theirs = items["meta"]["step"], items["meta"]["identity"]
        faults = [
            f"{field} may not change when a run resumes, got {new!r}, the checkpoint of step {step} has {old!r}; {remedy}"
            for field, old, new in config_lib.diff(theirs, self._identity)
            if field not in may_differ
        ]
        if not faults and items["data"]["fingerprint"] != self._data_fingerprint:
            faults.append(
                f"the training data may not change when a run resumes, got fingerprint {self._data_fingerprint!r}, the"
                f" checkpoint of step {step} has {items['data']['fingerprint']!r}; put the data back, or start a new run in another run.workdir"
            )
        if faults:
            raise ConfigError(*faults)

    def _meta(self, step: int, extra: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "step": step,
            "config": self._config_json,
            "identity": self._identity,
            "config_fingerprint": config_lib.fingerprint(self._identity),
            "versions": self._versions,
            "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            "num_processes": jax.process_count(),
            "unix_time_s": round(time.time(), 3),
            **extra,
        }

    def _finish(
        self, step: int, leaves: list[dict], hashes: list[jax.Array], items: Mapping[str, Any]
    ) -> None:
        """In the background: wait for the commit, write the manifest, drop what retention does not keep."""
        path = self._path(step)
        with storage_errors(path, _STORAGE_KINDS), self._abandoned_on_error(step):
            self._orbax.wait_until_finished()
            if not self._writer:
                return
            for name, item in items.items():
                assert _read_json_item(path, name) == item, f"{path}/{name} does not hold what was saved"
            for leaf, pair in zip(leaves, hashes, strict=True):
                leaf["hash"] = hash_text(pair)
            body = {"format": _FORMAT, "step": step, "leaves": leaves, "files": _list_files(path)}
            write_atomic(path / MANIFEST, _manifest_text(body))
        try:
            self._retain()
        except (
            OSError
        ) as error:  # the save is good; what could not be deleted is tried again after the next one
            self._log(f"checkpoint: an old step stays for now: {error}")

    def _retain(self) -> None:
        """Keep the last few and every n-th; drop the rest and whatever older has no manifest."""
        steps = self.steps()
        keep = set(steps[-self._policy.keep_last :]) | set(self._policy.keep_steps)
        if self._policy.keep_every_steps is not None:
            keep |= {step for step in steps if step % self._policy.keep_every_steps == 0}
        for step in _step_folders(self._folder):
            if step not in keep and step <= steps[-1]:
                _remove(self._path(step))

    @contextlib.contextmanager
    def _abandoned_on_error(self, step: int) -> Iterator[None]:
        """Remove what a refused save left, so that a full disk is not fuller for it."""
        try:
            yield
        except BaseException:
            if self._writer:
                with contextlib.suppress(OSError):  # the refusal itself is what gets reported
                    self._remove_temporaries()
                    self._remove_unfinished(step)
            raise

    def _remove_temporaries(self) -> None:
        """Folders that Orbax was writing when a former process died."""
        for leftover in self._folder.glob(_TEMPORARY):
            shutil.rmtree(leftover)

    def _remove_unfinished(self, step: int) -> None:
        """A folder of `step` that never got its manifest."""
        if self._path(step).exists() and not self._has_manifest(step):
            shutil.rmtree(self._path(step))

    def _quarantine(self, step: int, reason: str) -> None:
        if not self._writer:
            return
        path = self._path(step)
        target = path.with_name(f"{step}.bad")
        number = 2
        while target.exists():
            target, number = path.with_name(f"{step}.bad.{number}"), number + 1
        with storage_errors(path):
            path.rename(target)
        self._log(f"checkpoint: step {step} is damaged ({reason}); kept as {target.name}")

    def _has_manifest(self, step: int) -> bool:
        return (self._path(step) / MANIFEST).is_file()

    def _path(self, step: int) -> Path:
        return self._folder / str(step)


# --- reading without a run ---------------------------------------------------------------------------


def saved_steps(folder: str | Path) -> list[int]:
    """The steps in a checkpoint folder that have a manifest, oldest first; not verified.

    Raises:
      Unreadable: the folder cannot be listed.
    """
    folder = Path(folder)
    try:
        return [step for step in _step_folders(folder) if (folder / str(step) / MANIFEST).is_file()]
    except OSError as error:
        remedy = machine_fault(error) or "see to the storage"
        raise Unreadable(f"a checkpoint folder must be readable, got {error}; {remedy}") from error


def restore_params(folder: str | Path, abstract_params: Any = None, *, step: int | None = None) -> Any:
    """The verified parameters of the newest readable step (or of `step`); nothing is renamed.

    `folder` is a checkpoint folder or one step in it. `abstract_params` gives shapes, dtypes and shardings;
    without it the arrays come as they were stored, on the first device, as a nested dict.

    Raises:
      NoCheckpoint: there is none.
      AllCheckpointsBad: there are, but all are damaged.
      ConfigError: the parameters have other shapes than `abstract_params`, or this machine cannot read them.
    """
    logging.getLogger("absl").addFilter(_not_orbax)
    folder = Path(folder).absolute()
    if (folder / MANIFEST).is_file():
        paths = [folder]
    else:
        paths = [folder / str(s) for s in reversed(saved_steps(folder)) if step is None or s == step]
    if not paths:
        wanted = "a checkpoint" if step is None else f"a checkpoint of step {step}"
        raise NoCheckpoint(f"{wanted} is needed, and {folder} holds none; train first or name another folder")
    bad = []
    for path in paths:
        try:
            manifest, groups = _agreed(functools.partial(_inspect_params, path, abstract_params))
            loaded = _load(path, manifest, groups)["params"]
        except Damaged as error:
            bad.append((int(path.name) if path.name.isdigit() else path.name, str(error)))
            continue
        if abstract_params is None:
            return _nest(loaded)
        return _fill(abstract_params, {f"params.{name}": leaf for name, leaf in loaded.items()}, "params")
    raise AllCheckpointsBad(
        f"a readable checkpoint is needed, and all in {folder} are damaged ({_list(bad)})"
    )


def _inspect_params(path: Path, abstract_params: Any) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The manifest of a step whose files are whole, and the parameters to load."""
    manifest = read_manifest(path)
    _check_files(path, manifest)
    wanted = _stored_leaves(manifest, "params") if abstract_params is None else abstract_params
    groups = {"params": jax.tree.map(_abstract, named_leaves(wanted))}
    _check_leaves(path, manifest, groups)
    return manifest, groups


def read_item(folder: str | Path, item: str) -> Any:
    """A JSON item ("data", "ledger", "meta") of one step folder, verified against its manifest.

    Raises:
      Damaged: the step contradicts its manifest.
    """
    path = Path(folder).absolute()
    _check_files(path, read_manifest(path), only=f"{item}/")
    return _read_json_item(path, item)


def verify(folder: str | Path) -> list[dict[str, Any]]:
    """Check one step folder without any model code: read everything, compare with the manifest.

    Returns the manifest's leaves.

    Raises:
      Damaged: what contradicts the manifest.
    """
    logging.getLogger("absl").addFilter(_not_orbax)
    path = Path(folder).absolute()
    manifest = read_manifest(path)
    _check_files(path, manifest)
    for name in _JSON_ITEMS:
        _read_json_item(path, name)
    groups = {item: _stored_leaves(manifest, item) for item in _ARRAY_ITEMS}
    _load(path, manifest, jax.tree.map(_abstract, groups))
    return manifest["leaves"]


def params_sha256(params: Any, *, block_bytes: int = 256 << 20) -> str:
    """sha256 (hex) over all parameters in path order: path, dtype, shape, little-endian bytes.

    The mesh does not matter. In a multi-process run every process calls it and gets the same; beside what the
    parameters take, a device and a host hold a few times `block_bytes`, whatever the size of the model.
    """
    digest = hashlib.sha256()
    for name, leaf in named_leaves(params).items():
        leaf = leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)
        digest.update(f"{name}\0{leaf.dtype.name}\0{leaf.shape}\0".encode())
        for block in host_blocks(leaf, block_bytes) if isinstance(leaf, jax.Array) else (leaf,):
            block = np.ascontiguousarray(block.astype(block.dtype.newbyteorder("<"), copy=False))
            digest.update(block.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a step folder.

    Raises:
      Damaged: absent, not the text that was written, or of another format.
    """
    with _reading(path / MANIFEST, MANIFEST):
        text = (path / MANIFEST).read_text()
        manifest = json.loads(text)
        intact = isinstance(manifest, dict) and _manifest_text(manifest.get("body")) == text
    if not intact:
        raise Damaged(f"{MANIFEST} does not match its own hash")
    if manifest["body"]["format"] != _FORMAT:
        raise Damaged(f"{MANIFEST} has format {manifest['body']['format']}, this version reads {_FORMAT}")
    return manifest["body"]


# --- pieces ------------------------------------------------------------------------------------------


def _groups(state: Any) -> dict[str, dict[str, Any]]:
    """The array items: flat dicts, so that no container type of optax or of ours reaches the disk."""
    return {
        "params": named_leaves(state.params),
        "opt_state": named_leaves(state.opt_state),
        "health": named_leaves({"step": state.step, "health": state.health}),
    }


def _describe(groups: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One manifest entry a leaf, in the order of `hash_leaves`."""
    return [
        {"leaf": name, "shape": list(np.shape(leaf)), "dtype": np.dtype(leaf.dtype).name}
        for name, leaf in named_leaves(groups).items()
    ]


def _stored_leaves(manifest: Mapping[str, Any], item: str) -> dict[str, jax.ShapeDtypeStruct]:
    """The leaves of one item as the manifest describes them, by their path inside the item."""
    return {
        entry["leaf"].removeprefix(f"{item}."): jax.ShapeDtypeStruct(
            tuple(entry["shape"]), np.dtype(entry["dtype"])
        )
        for entry in manifest["leaves"]
        if entry["leaf"].startswith(f"{item}.")
    }


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape, dtype and a sharding that Orbax can restore to."""
    sharding = getattr(leaf, "sharding", None)
    if sharding is None or (isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, AbstractMesh)):
        sharding = SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype, sharding=sharding)


def _check_files(path: Path, manifest: Mapping[str, Any], only: str = "") -> None:
    """Every listed file is there with its size and, where it has one, its hash."""
    for name, entry in manifest["files"].items():
        if not name.startswith(only):
            continue
        file = path / name
        with _reading(file, name):
            if not file.is_file():
                raise Damaged(f"{name} is missing")
            size = file.stat().st_size
            if size != entry["bytes"]:
                raise Damaged(f"{name} has {size} bytes, the manifest says {entry['bytes']}")
            if "sha256" in entry and file_sha256(file) != entry["sha256"]:
                raise Damaged(f"{name} does not match its hash")


def _list_files(path: Path) -> dict[str, dict[str, Any]]:
    files = {}
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        entry: dict[str, Any] = {"bytes": file.stat().st_size}
        if entry["bytes"] <= _HASHED_FILE_BYTES:
            entry["sha256"] = file_sha256(file)
        files[file.relative_to(path).as_posix()] = entry
    return files


def _check_leaves(path: Path, manifest: Mapping[str, Any], groups: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise ConfigError naming the leaves in which the wanted state differs from the stored one."""
    faults = []
    for item in (name for name in _ARRAY_ITEMS if name in groups):  # parameters first: they tell the most
        wanted, stored = groups[item], _stored_leaves(manifest, item)
        for name in sorted(stored.keys() | wanted.keys()):
            texts = [
                f"{leaf.dtype}{list(leaf.shape)}" if (leaf := leaves.get(name)) is not None else "absent"
                for leaves in (stored, wanted)
            ]
            if texts[0] != texts[1]:
                faults.append(f"{item}.{name} is {texts[0]} in the checkpoint and {texts[1]} in this model")
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise ConfigError(
            f"a checkpoint must have the shapes of the model, got {path}: {faults[0]}{more}; use the model of that"
            " run, or start a new run in another run.workdir"
        )


def _load(
    path: Path, manifest: Mapping[str, Any], groups: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict]:
    """Read array items into the wanted shardings and compare the hash of every leaf; all processes together."""
    # Each process reads its own part, and nobody waits for another before all have said how it went.
    loaded = _agreed(functools.partial(_read_arrays, path, groups))
    hashes = jax.device_get(hash_leaves(loaded))
    expected = {entry["leaf"]: entry["hash"] for entry in manifest["leaves"]}
    for name, pair in zip(named_leaves(loaded), hashes, strict=True):
        if hash_text(pair) != expected[name]:
            raise Damaged(f"{name} has hash {hash_text(pair)}, the manifest says {expected[name]}")
    return loaded


def _read_arrays(path: Path, groups: Mapping[str, Mapping[str, Any]]) -> dict[str, dict]:
    """This process's part of array items. Orbax's Checkpointer would end in a barrier, its handler does not."""
    arguments = {}
    for item, leaves in groups.items():
        restore_args = {
            name: ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype)
            for name, leaf in leaves.items()
        }
        arguments[item] = ocp.args.PyTreeRestore(dict(leaves), restore_args=restore_args)
    reader = ocp.CompositeCheckpointHandler()
    try:
        with _reading(path, "cannot be read"):
            # pathlib's paths have what the handler uses of the paths that it names.
            loaded = reader.restore(path, ocp.args.Composite(**arguments))  # pyright: ignore[reportArgumentType]
            return jax.block_until_ready({item: dict(loaded[item]) for item in groups})
    finally:
        reader.close()


@contextlib.contextmanager
def _reading(path: Path, what: str) -> Iterator[None]:
    """Tell apart what reading `path` runs into: Unreadable for the machine's fault, Damaged for the file's."""
    try:
        yield
    except (Damaged, ConfigError):
        raise
    except _STORAGE_KINDS as error:
        if "RESOURCE_EXHAUSTED" in str(error):  # no room for it here, which says nothing about the files
            raise
        line = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        remedy = machine_fault(error)
        if remedy is not None:
            raise Unreadable(
                f"a checkpoint must be readable by all processes, and process {jax.process_index()} cannot read {path} "
                f"({line}); {remedy}; nothing was changed"
            ) from error
        raise Damaged(f"{what}: {line}") from error


def machine_fault(error: BaseException) -> str | None:
    """What to do about an error that is no file's fault, None for any other.

    Libraries wrap what the kernel said: the chain of causes is searched, and the text of each link.
    """
    faults = _MACHINE_FAULTS if jax.process_index() == 0 else _MACHINE_FAULTS | _UNSEEN
    link: BaseException | None = error
    while link is not None:
        for number, remedy in faults.items():
            if getattr(link, "errno", None) == number or os.strerror(number) in str(link):
                return remedy
        link = link.__cause__ or link.__context__
    return None


def _agreed(work: Callable[[], Result]) -> Result:
    """`work()`, or in all processes the same kind of exception as soon as it fails in one.

    `work` must not wait for other processes. A machine that cannot read comes before a damaged file, and that
    before another config, which only a whole file can tell.
    """
    result, failure = None, None
    try:
        result = work()
    except (Damaged, ConfigError) as error:
        failure = error
    said = texts_of_all("" if failure is None else f"{type(failure).__name__} {failure}")
    for kind in (Unreadable, Damaged, ConfigError):
        if type(failure) is kind:
            raise failure
        for process, text in enumerate(said):
            name, _, line = text.partition(" ")
            if name == kind.__name__:
                raise kind(f"process {process}: {line}" if kind is Damaged else line)
    assert failure is None, failure
    return result  # type: ignore[return-value]


def _fill(abstract: Any, values: Mapping[str, Any], prefix: str) -> Any:
    """`abstract` with each leaf replaced by the value of its name."""
    names = iter(_names_in_tree_order(abstract))
    return jax.tree.map(lambda _: values[f"{prefix}.{next(names)}"], abstract)


def _names_in_tree_order(tree: Any) -> list[str]:
    leaves, structure = jax.tree.flatten(tree)
    places = jax.tree.unflatten(structure, range(len(leaves)))
    by_place = {place: name for name, place in named_leaves(places).items()}
    return [by_place[place] for place in range(len(leaves))]


def _nest(named: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted names as a nested dict."""
    tree: dict[str, Any] = {}
    for name, leaf in named.items():
        *parents, last = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def _read_json_item(path: Path, item: str) -> Any:
    with _reading(path / item, item):
        return json.loads((path / item / "metadata").read_text())


def _manifest_text(body: Any) -> str:
    """The manifest with a hash of itself: a flipped bit in it must not condemn or acquit anything."""
    text = json.dumps(body, separators=(",", ":"))
    digest = hashlib.sha256(text.encode()).hexdigest()
    return f'{{"body":{text},"sha256":"{digest}"}}\n'


def _step_folders(folder: Path) -> list[int]:
    if not folder.is_dir():
        return []
    return sorted(int(p.name) for p in folder.iterdir() if _STEP_FOLDER.fullmatch(p.name) and p.is_dir())


def _remove(path: Path) -> None:
    """Delete a step; its manifest first, so that a half-deleted step does not exist."""
    (path / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(path)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _list(bad: list) -> str:
    return "; ".join(f"step {step}: {reason}" for step, reason in bad)


def _not_orbax(record: logging.LogRecord) -> bool:
    """Keep a log record that is not from Orbax: its errors are raised, the rest is talk about itself."""
    return "/orbax/" not in record.pathname
