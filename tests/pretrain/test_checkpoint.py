"""Checkpoints: what was saved comes back bit for bit on any mesh, damage is found and passed over, nothing else is."""

import dataclasses
import errno
import functools
import gc
import importlib.util
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from pretrain import checkpoint
from pretrain.checkpoint import (
    AllCheckpointsBad,
    Checkpointer,
    CheckpointPolicy,
    Damaged,
    NoCheckpoint,
    Unreadable,
    params_sha256,
    read_item,
    restore_params,
    saved_steps,
    verify,
)
from pretrain.config import ConfigError, local
from pretrain.config import to_json as config_to_json
from pretrain.health import Ledger, init_health
from pretrain.sharding import block_reader, block_shape, host_blocks

ITEMS = ("params", "opt_state", "health", "data", "ledger", "meta")
OPTIMIZER = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.masked(optax.adamw(1e-2), {"blocks": {"w": True, "b": False}, "embed": True}),
)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["step", "params", "opt_state", "health"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class State:
    step: jax.Array
    params: dict
    opt_state: object
    health: dict


def make_state(seed, width=16):
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {
        "blocks": {"w": jax.random.normal(keys[0], (2, width, 8)), "b": jax.random.normal(keys[1], (2, 8))},
        "embed": jax.random.normal(keys[2], (32, width), jnp.bfloat16),
    }
    return State(jnp.asarray(seed, jnp.int32), params, OPTIMIZER.init(params), init_health())


def abstract(state):
    return jax.eval_shape(lambda: state)


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(jax.device_get(a)), jax.tree.leaves(jax.device_get(b)), strict=True):
        assert x.dtype == y.dtype
        assert x.shape == y.shape
        assert x.tobytes() == y.tobytes()


def snapshot(folder):
    """Every file's bytes by relative path."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """A folder with steps 1, 2 and 3, made once; copy it before touching it."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    writer = open_folder(folder, CheckpointPolicy(keep_last=3))
    for step in (1, 2, 3):
        ledger = Ledger()
        ledger.skip(
            step - 1, rows=[("books", step)], loss=float("inf"), grad_norm=1.0, reason="loss not finite"
        )
        writer.save(
            make_state(step), step, {"ledger": ledger, "meta": {"note": "hi"}, "data": {"epoch": 0.5}}
        )
    writer.close()
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "checkpoints")


def open_folder(folder, policy=CheckpointPolicy(), config=None, data="corpus-1", log=None):
    lines = [] if log is None else log
    return Checkpointer(folder, {"seed": 1} if config is None else config, data, policy, log=lines.append)


# --- what was saved comes back -----------------------------------------------------------------------


def test_restore_gives_the_bits_the_step_and_the_ledger(folder):
    state, step, ledger = open_folder(folder).restore_latest(abstract(make_state(0)))
    assert step == 3
    assert_same_bits(state, make_state(3))
    assert ledger.skipped_steps == [2]
    assert ledger.entries[0]["rows"] == [["books", 3]]


def test_no_checkpoint_is_none(tmp_path):
    reader = open_folder(tmp_path / "new")
    assert reader.restore_latest(abstract(make_state(0))) is None
    assert reader.latest_step() is None


def test_the_state_may_be_donated_right_after_save(tmp_path):
    writer = open_folder(tmp_path)
    update = jax.jit(lambda s: jax.tree.map(lambda x: x + jnp.ones((), x.dtype), s), donate_argnums=0)
    state = jax.device_put(make_state(5, width=2048))
    wanted = jax.tree.map(lambda x: np.array(x, copy=True), state)
    writer.save(state, 5)
    for _ in range(10):
        state = update(state)
    writer.wait()
    restored = writer.restore_latest(abstract(wanted))
    assert restored is not None
    assert_same_bits(restored[0], wanted)


def test_checkpoint_carries_config_versions_data_and_ledger(folder):
    meta = read_item(folder / "3", "meta")
    assert meta["config"] == {"seed": 1}
    assert meta["step"] == 3
    assert meta["note"] == "hi"
    assert meta["versions"]["jax"] == jax.__version__
    assert read_item(folder / "3", "data") == {"step": 3, "fingerprint": "corpus-1", "epoch": 0.5}
    assert read_item(folder / "3", "ledger")["entries"][0]["loss"] == "inf"
    (folder / "3" / "data" / "metadata").write_text("{}")
    with pytest.raises(Damaged, match="data/metadata"):
        read_item(folder / "3", "data")


def mesh_state(state, shape, names, specs, kind=AxisType.Explicit):
    mesh = jax.make_mesh(shape, names, axis_types=(kind,) * len(names))

    def place(x):
        return NamedSharding(
            mesh, PartitionSpec(*specs[: x.ndim]) if x.ndim >= len(specs) else PartitionSpec()
        )

    return jax.tree.map(lambda x: jax.device_put(x, place(x)), state)


MESHES = {
    "8": ((8,), ("fsdp",), (None, "fsdp")),
    "4x2": ((4, 2), ("fsdp", "tensor"), (None, "fsdp", "tensor")),
    "2x2x2": ((2, 2, 2), ("replica", "fsdp", "tensor"), ("fsdp", "tensor")),
}


@pytest.mark.parametrize(("source", "target"), [("8", "4x2"), ("4x2", "2x2x2"), ("2x2x2", "1"), ("1", "8")])
def test_any_mesh_reads_what_any_mesh_wrote(tmp_path, source, target):
    wanted = make_state(4)
    writer = open_folder(tmp_path)
    writer.save(wanted if source == "1" else mesh_state(wanted, *MESHES[source]), 4)
    writer.close()
    place = wanted if target == "1" else mesh_state(make_state(0), *MESHES[target])
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), place)
    restored = open_folder(tmp_path).restore_latest(shapes)
    assert restored is not None
    assert_same_bits(restored[0], wanted)
    for got, asked in zip(jax.tree.leaves(restored[0]), jax.tree.leaves(shapes), strict=True):
        assert got.sharding.is_equivalent_to(asked.sharding, got.ndim)
    assert params_sha256(restored[0].params) == params_sha256(wanted.params)


def test_params_alone_with_and_without_their_shapes(folder):
    wanted = make_state(3).params
    assert_same_bits(restore_params(folder), wanted)
    assert_same_bits(restore_params(folder / "2"), make_state(2).params)
    assert_same_bits(restore_params(folder, abstract(wanted), step=1), make_state(1).params)
    before = snapshot(folder)
    with pytest.raises(ConfigError, match=r"params\.blocks\.w is float32\[2, 16, 8\] .* float32\[2, 24, 8\]"):
        restore_params(folder, abstract(make_state(0, width=24).params))
    assert snapshot(folder) == before


def test_params_of_a_damaged_step_come_from_an_older_one_and_nothing_is_renamed(folder):
    flip_byte(largest_file(folder / "3" / "params"))
    before = snapshot(folder)
    assert_same_bits(restore_params(folder), make_state(2).params)
    assert snapshot(folder) == before
    with pytest.raises(AllCheckpointsBad, match="step 3"):
        restore_params(folder, step=3)
    with pytest.raises(NoCheckpoint, match="step 9"):
        restore_params(folder, step=9)
    with pytest.raises(NoCheckpoint, match="train first"):
        restore_params(folder / "nowhere")


def test_params_sha256_sees_path_dtype_shape_and_every_bit():
    params = {"b": {"w": np.arange(6, dtype=np.float32)}, "a": np.zeros((2, 3), np.float32)}
    same = {"a": jnp.zeros((2, 3)), "b": {"w": jnp.arange(6.0)}}
    assert params_sha256(params) == params_sha256(same)
    changed = [
        {"b": {"v": params["b"]["w"]}, "a": params["a"]},
        {"b": {"w": params["b"]["w"].reshape(2, 3)}, "a": params["a"]},
        {"b": {"w": params["b"]["w"].astype(np.int32)}, "a": params["a"]},
        {"b": {"w": params["b"]["w"]}, "a": -params["a"]},
        {"b": {"w": params["a"].reshape(6)}, "a": params["b"]["w"].reshape(2, 3)},
    ]
    assert len({params_sha256(p) for p in [params, *changed]}) == 6
    assert params_sha256({"a": np.zeros(2, ">f4")}) == params_sha256({"a": np.zeros(2, "<f4")})


LEAVES = {
    "narrow": np.arange(8 * 6 * 4, dtype=np.float32).reshape(8, 6, 4) - 90.5,
    "signs": np.where(np.arange(16) % 3, -0.0, np.nan).astype(np.float32).reshape(4, 4),
    "half": np.linspace(-3, 3, 64, dtype=np.float32).reshape(2, 4, 8).astype(jnp.bfloat16),
    "bytes": np.arange(32, dtype=np.int8).reshape(4, 8) - 7,
    "flags": (np.arange(32) % 5 == 0).reshape(8, 4),
    "scalar": np.float32(3.5),
}
LAYOUTS = [
    {"narrow": ("a", None, "b"), "signs": (None, "a"), "half": ("b", "a"), "bytes": ("b", "a"), "flags": (("a", "b"),)},
    {"narrow": (("b", "a"),), "signs": ("a", "b"), "half": (None, None, ("a", "b")), "bytes": (None, "b"), "flags": ("a",)},
    {},
]  # fmt: skip


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_params_sha256_is_that_of_the_whole_arrays_for_any_layout_and_block(layout, kind):
    wanted = params_sha256(LEAVES)
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind, kind))
    laid = {
        name: jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*layout.get(name, ()))))
        for name, leaf in LEAVES.items()
    }
    for block_bytes in (4, 40, 1 << 20):
        assert params_sha256(laid, block_bytes=block_bytes) == wanted, block_bytes


@pytest.mark.parametrize(
    "spec", [("a", "b"), ("b", None, "a"), (None, "a", "b"), (None, None, ("a", "b"))], ids=str
)
def test_a_large_leaf_reaches_the_host_in_blocks_and_lies_on_no_device_whole(spec):
    leaf_bytes, block_bytes = 64 << 20, 1 << 20
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    sharding, shape = NamedSharding(mesh, PartitionSpec(*spec)), (4, 1024, 4096)
    leaf = jax.jit(lambda: jnp.ones(shape), out_shardings=sharding)()
    blocks = [block.nbytes for block in host_blocks(leaf, block_bytes)]
    assert sum(blocks) == leaf_bytes
    assert max(blocks) <= block_bytes
    block = block_shape(shape, sharding.shard_shape(shape), block_bytes // 4)
    memory = (
        block_reader(sharding, shape, block).lower(leaf, np.zeros(3, np.int32)).compile().memory_analysis()
    )
    assert memory.temp_size_in_bytes + memory.output_size_in_bytes <= 4 * block_bytes


# A failed save or read leaves coroutines of Orbax that complain about their closed event loop when they are collected.
orbax_debris = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


# --- damage ------------------------------------------------------------------------------------------


def largest_file(folder):
    return max((p for p in Path(folder).rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip_byte(path, where=0.5):
    data = bytearray(path.read_bytes())
    data[int(len(data) * where)] ^= 0x10
    path.write_bytes(data)


def expect_fallback(folder, to, bad):
    """Restoring takes step `to`, keeps each of `bad` under another name and says so in log and ledger."""
    before = {step: snapshot(folder / str(step)) for step in bad}
    log = []
    restored = open_folder(folder, log=log).restore_latest(abstract(make_state(0)))
    assert restored is not None
    state, step, ledger = restored
    assert step == to
    assert_same_bits(state, make_state(to))
    for number in bad:
        assert not (folder / str(number)).exists()
        assert snapshot(folder / f"{number}.bad") == before[number]
        assert any(f"step {number} is damaged" in line for line in log)
    assert [entry["step"] for entry in ledger.select("quarantine")] == sorted(bad)
    return ledger


@pytest.mark.parametrize("where", [0.0, 0.5, 0.999])
@pytest.mark.parametrize("item", ITEMS)
def test_a_flipped_byte_in_an_item_falls_back(folder, item, where):
    flip_byte(largest_file(folder / "3" / item), where)
    ledger = expect_fallback(folder, to=2, bad=[3])
    assert item in ledger.select("quarantine")[0]["reason"]


@pytest.mark.parametrize("where", [0.02, 0.5, 0.99])
def test_a_flipped_byte_in_the_manifest_falls_back(folder, where):
    flip_byte(folder / "3" / "manifest.json", where)
    expect_fallback(folder, to=2, bad=[3])


@pytest.mark.parametrize("item", ["params", "opt_state"])
def test_leaf_hashes_alone_find_a_changed_number(folder, item, monkeypatch):
    """Large files carry no file hash. Here none does, and a leaf's bytes are replaced by valid other ones."""
    monkeypatch.setattr(checkpoint, "_HASHED_FILE_BYTES", -1)
    writer = open_folder(folder, CheckpointPolicy(keep_last=9))
    writer.save(make_state(4), 4)
    other = dataclasses.replace(make_state(4), params=make_state(5).params)
    if item == "opt_state":
        other = dataclasses.replace(
            make_state(4), opt_state=jax.tree.map(lambda x: x + x.dtype.type(1), other.opt_state)
        )
    writer.save(other, 5)
    writer.close()
    assert not any("sha256" in entry for entry in checkpoint.read_manifest(folder / "5")["files"].values())
    manifest = json.loads((folder / "4" / "manifest.json").read_text())["body"]
    shutil.rmtree(folder / "4" / item)
    shutil.copytree(folder / "5" / item, folder / "4" / item)
    files = {n: e for n, e in manifest["files"].items() if not n.startswith(f"{item}/")}
    files |= {n: e for n, e in checkpoint._list_files(folder / "4").items() if n.startswith(f"{item}/")}
    (folder / "4" / "manifest.json").write_text(checkpoint._manifest_text(manifest | {"files": files}))
    shutil.rmtree(folder / "5")
    ledger = expect_fallback(folder, to=3, bad=[4])
    assert "has hash" in ledger.select("quarantine")[0]["reason"]


@pytest.mark.parametrize("item", ["params", "opt_state"])
def test_garbage_that_orbax_cannot_read_falls_back(folder, item, monkeypatch):
    """The second line of defense when files carry no hash: what Orbax raises is damage, too."""
    for name, entry in checkpoint.read_manifest(folder / "3")["files"].items():
        if name.startswith(item):
            (folder / "3" / name).write_bytes(b"\x00" * entry["bytes"])
    body = checkpoint.read_manifest(folder / "3")
    body["files"] = {name: {"bytes": entry["bytes"]} for name, entry in body["files"].items()}
    (folder / "3" / "manifest.json").write_text(checkpoint._manifest_text(body))
    expect_fallback(folder, to=2, bad=[3])


def damage_truncate_manifest(step):
    text = (step / "manifest.json").read_text()
    (step / "manifest.json").write_text(text[: len(text) // 2])


def damage_empty_manifest(step):
    (step / "manifest.json").write_text("")


def damage_truncate_file(step):
    path = largest_file(step / "opt_state")
    os.truncate(path, path.stat().st_size // 2)


def damage_empty_file(step):
    largest_file(step / "params").write_bytes(b"")


def damage_delete_file(step):
    largest_file(step / "params").unlink()


def damage_delete_orbax_metadata(step):
    (step / "_CHECKPOINT_METADATA").unlink()


def damage_delete_tree_metadata(step):
    (step / "params" / "_METADATA").unlink()


DAMAGES = [f for name, f in sorted(globals().items()) if name.startswith("damage_")]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__.removeprefix("damage_"))
def test_damaged_files_fall_back(folder, damage):
    damage(folder / "3")
    expect_fallback(folder, to=2, bad=[3])


@pytest.mark.parametrize("item", ITEMS)
def test_a_deleted_item_falls_back(folder, item):
    shutil.rmtree(folder / "3" / item)
    expect_fallback(folder, to=2, bad=[3])


def failing(function, part, number):
    """`function`, to which the kernel answers with an error where a path has `part` in it."""

    def fails(path, *rest):
        if part in str(path):
            raise OSError(number, os.strerror(number), str(path))
        return function(path, *rest)

    return fails


def test_a_file_that_the_disk_cannot_give_back_falls_back(folder, monkeypatch):
    monkeypatch.setattr(checkpoint, "file_sha256", failing(checkpoint.file_sha256, "/3/params/", errno.EIO))
    ledger = expect_fallback(folder, to=2, bad=[3])
    assert "Input/output error" in ledger.select("quarantine")[0]["reason"]


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.EMFILE, "raise `ulimit -n`"),
        (errno.ENFILE, "close some"),
        (errno.EACCES, "permissions"),
        (errno.ESTALE, "mount it anew"),
    ],
    ids=errno.errorcode.get,
)
def test_what_is_the_fault_of_the_machine_stops_and_condemns_no_step(folder, number, remedy, monkeypatch):
    monkeypatch.setattr(checkpoint, "file_sha256", failing(checkpoint.file_sha256, "/3/params/", number))
    expect_refusal(folder, f"{os.strerror(number)}.*{remedy}.*nothing was changed")
    with pytest.raises(Unreadable):
        restore_params(folder)


@orbax_debris
def test_too_few_file_handles_condemn_no_step(folder, monkeypatch):
    """For real: our own reading has its one handle at a time, and Orbax needs more."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    shapes = abstract(make_state(0))
    hashed = checkpoint._check_files

    def then_no_more(*arguments):
        hashed(*arguments)
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")), limits[1]))

    monkeypatch.setattr(checkpoint, "_check_files", then_no_more)
    before = snapshot(folder)
    try:
        with pytest.raises(Unreadable, match="raise `ulimit -n`"):
            open_folder(folder).restore_latest(shapes)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert snapshot(folder) == before
    gc.collect()


def test_a_folder_that_cannot_be_listed_is_one_clear_line(folder, monkeypatch):
    monkeypatch.setattr(checkpoint, "_step_folders", failing(checkpoint._step_folders, "", errno.EACCES))
    with pytest.raises(Unreadable, match=r"must be readable.*Permission denied.*be its owner"):
        saved_steps(folder)


def test_two_damaged_steps_fall_back_to_the_third(folder):
    flip_byte(largest_file(folder / "3" / "params"))
    damage_truncate_manifest(folder / "2")
    expect_fallback(folder, to=1, bad=[3, 2])


def test_all_damaged_is_its_own_error_also_the_second_time(folder):
    for step in (1, 2, 3):
        flip_byte(largest_file(folder / str(step) / "params"))
    before = snapshot(folder)
    for _ in range(2):
        with pytest.raises(
            AllCheckpointsBad, match="all in .* are damaged.*step 3.*move that folder away"
        ) as caught:
            open_folder(folder).restore_latest(abstract(make_state(0)))
        assert caught.value.exit_code == 4
        assert snapshot(folder) == before, "nothing is renamed unless an older step was restored"
    for step in (1, 2, 3):
        (folder / str(step)).rename(folder / f"{step}.bad")
    with pytest.raises(AllCheckpointsBad, match=r"1\.bad, 2\.bad, 3\.bad"):
        open_folder(folder).restore_latest(abstract(make_state(0)))


def test_training_goes_on_after_a_fallback_and_saves_the_same_step_again(folder):
    flip_byte(largest_file(folder / "3" / "params"))
    run = open_folder(folder)
    restored = run.restore_latest(abstract(make_state(0)))
    assert restored is not None
    run.save(make_state(3), 3, {"ledger": restored[2]})
    run.wait()
    flip_byte(largest_file(folder / "3" / "params"))
    restored = run.restore_latest(abstract(make_state(0)))
    assert restored is not None
    assert restored[1] == 2
    assert sorted(p.name for p in folder.iterdir()) == ["2", "3.bad", "3.bad.2"]


def test_a_step_without_manifest_and_orbax_leftovers_are_not_there(folder):
    (folder / "3" / "manifest.json").unlink()
    leftover = shutil.copytree(folder / "2", folder / "4.orbax-checkpoint-tmp")
    (leftover / "manifest.json").unlink()
    run = open_folder(folder)
    assert run.latest_step() == 2
    restored = run.restore_latest(abstract(make_state(0)))
    assert restored is not None
    assert restored[1] == 2
    assert not restored[2].select("quarantine")
    assert not leftover.exists()
    run.save(make_state(3), 3)
    run.save(make_state(4), 4)
    run.wait()
    assert run.steps() == [3, 4]


# --- identity ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    seed: int = 1
    peak_lr: float = 0.1
    workdir: str = local("runs")


def expect_refusal(folder, match, **options):
    before = snapshot(folder)
    state = options.pop("state", make_state(0))
    with pytest.raises(ConfigError, match=match) as caught:
        open_folder(folder, **options).restore_latest(abstract(state))
    assert snapshot(folder) == before
    return caught.value


def test_another_config_is_refused_and_changes_nothing(tmp_path):
    writer = open_folder(tmp_path, config=config_to_json(Config()))
    writer.save(make_state(3), 3)
    writer.close()
    changed = config_to_json(Config(seed=2, peak_lr=0.2))
    error = expect_refusal(
        tmp_path, r"seed may not change .* got 2, the checkpoint of step 3 has 1", config=changed
    )
    assert len(error.faults) == 2
    assert "peak_lr" in error.faults[1]
    moved = open_folder(tmp_path, config=config_to_json(Config(workdir="elsewhere")))
    assert moved.restore_latest(abstract(make_state(0))) is not None, "a local field may change"


def test_other_data_is_refused_and_changes_nothing(folder):
    expect_refusal(folder, "training data may not change .*'corpus-2'.*'corpus-1'", data="corpus-2")


def test_another_model_shape_names_the_leaf_and_both_shapes(folder):
    expect_refusal(
        folder,
        r"params\.blocks\.w is float32\[2, 16, 8\] in the checkpoint and float32\[2, 24, 8\] in this model",
        state=make_state(0, width=24),
    )
    state = make_state(0)
    fewer = dataclasses.replace(state, params={"embed": state.params["embed"]})
    expect_refusal(folder, r"params\.blocks\.b is float32\[2, 8\] in the checkpoint and absent", state=fewer)
    other = dataclasses.replace(state, opt_state=optax.sgd(0.1, momentum=0.9).init(state.params))
    expect_refusal(folder, r"opt_state\.", state=other)


def test_damage_is_looked_at_before_identity(folder):
    flip_byte(folder / "3" / "meta" / "metadata")
    expect_refusal(folder, "checkpoint of step 2", data="corpus-2")


# --- policy ------------------------------------------------------------------------------------------


def test_retention_keeps_the_last_ones_and_every_nth(tmp_path):
    writer = open_folder(
        tmp_path, CheckpointPolicy(every_s=None, every_steps=2, keep_last=2, keep_every_steps=6)
    )
    kept = {}
    for step in range(1, 15):
        if writer.due(step):
            writer.save(make_state(0), step)
            writer.wait()
            kept[step] = writer.steps()
    assert kept == {2: [2], 4: [2, 4], 6: [4, 6], 8: [6, 8], 10: [6, 8, 10], 12: [6, 10, 12], 14: [6, 12, 14]}
    assert writer.latest_step() == 14
    assert saved_steps(tmp_path) == [6, 12, 14]


def test_retention_never_removes_the_newest_with_a_manifest(tmp_path):
    writer = open_folder(tmp_path, CheckpointPolicy(keep_last=1))
    for step in (1, 2):
        writer.save(make_state(0), step)
    writer.wait()
    shutil.copytree(tmp_path / "2", tmp_path / "9")
    (tmp_path / "9" / "manifest.json").unlink()
    writer._retain()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["2", "9"]


def test_an_old_step_that_cannot_be_deleted_is_said_and_tried_again(tmp_path, monkeypatch):
    log = []
    writer = open_folder(tmp_path, CheckpointPolicy(keep_last=1), log=log)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", failing(shutil.rmtree, "/1", errno.EBUSY))
        for step in (1, 2):
            writer.save(make_state(step), step)
            writer.wait()
    (line,) = log
    assert "an old step stays for now" in line
    assert "Device or resource busy" in line
    assert writer.steps() == [2], "a half-deleted step does not exist"
    writer.save(make_state(3), 3)
    writer.wait()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["3"]


def test_a_leftover_that_cannot_be_deleted_is_said(folder, monkeypatch):
    leftover = shutil.copytree(folder / "2", folder / "4.orbax-checkpoint-tmp")
    log = []
    monkeypatch.setattr(checkpoint.shutil, "rmtree", failing(shutil.rmtree, leftover.name, errno.EBUSY))
    restored = open_folder(folder, log=log).restore_latest(abstract(make_state(0)))
    assert restored is not None
    assert restored[1] == 3
    assert "an unfinished step stays for now" in log[0]


def test_time_based_saves(tmp_path):
    writer = open_folder(tmp_path, CheckpointPolicy(every_s=1000.0))
    writer.save(make_state(0), 1)
    assert not writer.due(2)
    writer._last_save -= 1001.0
    assert writer.due(3)


def test_saving_a_saved_step_changes_nothing(folder):
    before = snapshot(folder)
    writer = open_folder(folder)
    writer.save(make_state(7), 3)
    writer.wait()
    assert snapshot(folder) == before


def test_policy_names_all_faults():
    with pytest.raises(ValueError, match=r"(?s)every_steps.*every_s.*keep_last"):
        CheckpointPolicy(every_steps=0, every_s=-1.0, keep_last=0)


def test_orbax_says_nothing(tmp_path, capfd, caplog):
    writer = open_folder(tmp_path)
    writer.save(make_state(1), 1)
    writer.restore_latest(abstract(make_state(0)))
    restore_params(tmp_path)
    writer.close()
    output = capfd.readouterr()
    assert output.out == ""
    assert output.err == ""


# --- storage -----------------------------------------------------------------------------------------


def save_and_wait(writer, state, step):
    writer.save(state, step)
    writer.wait()


@orbax_debris
def test_a_refused_save_is_one_clear_line_and_leaves_the_older_step(tmp_path):
    """The file size limit stands for a full disk: the kernel refuses a write in the middle of a save."""
    writer = open_folder(tmp_path)
    writer.save(make_state(1), 1)
    writer.wait()
    before = snapshot(tmp_path)
    big = make_state(2, width=8192)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, limits[1]))
    try:
        with pytest.raises(ConfigError, match=r"run folder must be writable.*file size limit"):
            save_and_wait(writer, big, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert snapshot(tmp_path) == before
    writer.save(make_state(2), 2)
    writer.wait()
    assert writer.steps() == [1, 2]
    gc.collect()


@orbax_debris
def test_a_full_disk_is_one_clear_line_and_training_can_save_again(tmp_path):
    point = tmp_path / "disk"
    point.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", point], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"this user may not mount a small disk: {mounted.stderr.decode().strip()}")
    try:
        writer = open_folder(point / "checkpoints")
        save_and_wait(writer, make_state(1), 1)
        before = snapshot(point)
        with pytest.raises(ConfigError, match=r"run folder must be writable.*the disk is full"):
            save_and_wait(writer, make_state(2, width=65536), 2)
        assert snapshot(point) == before, "what the refused save had written is gone"
        save_and_wait(writer, make_state(3), 3)
        assert writer.steps() == [1, 3]
        writer.close()
        subprocess.run(["mount", "-o", "remount,ro", point], check=True)
        with pytest.raises(ConfigError, match="Read-only file system"):
            save_and_wait(open_folder(point / "checkpoints"), make_state(4), 4)
        restored = open_folder(point / "checkpoints").restore_latest(abstract(make_state(0)))
        assert restored is not None
        assert restored[1] == 3, "a read-only folder can be read"
    finally:
        gc.collect()
        subprocess.run(["umount", point], check=True)


@orbax_debris
def test_poll_raises_what_the_background_ran_into(tmp_path):
    writer = open_folder(tmp_path / "run" / "checkpoints")
    writer.poll()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8 * 1024, limits[1]))
    try:
        writer.save(make_state(2, width=4096), 2)
        assert writer._pending is not None
        writer._pending.exception(timeout=60)
        with pytest.raises(ConfigError):
            writer.poll()
        writer.poll()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    gc.collect()


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="choose another run.workdir"):
        open_folder(tmp_path / "file" / "checkpoints")


# --- verify without model code -----------------------------------------------------------------------


def test_verify_names_what_is_wrong(folder):
    leaves = verify(folder / "3")
    assert {"leaf": "params.blocks.b", "shape": [2, 8], "dtype": "float32"}.items() <= leaves[-3].items()
    flip_byte(largest_file(folder / "3" / "opt_state"))
    with pytest.raises(Damaged, match="opt_state/.* does not match its hash"):
        verify(folder / "3")


def test_verify_tool(folder, capsys, monkeypatch):
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "tools.verify_checkpoint", str(folder)]
    good = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert good.returncode == 0, good.stderr
    assert [line.split(",")[0] for line in good.stdout.splitlines()] == [
        "step 1: ok",
        "step 2: ok",
        "step 3: ok",
    ]
    spec = importlib.util.spec_from_file_location(
        "verify_checkpoint", root / "tools" / "verify_checkpoint.py"
    )
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    flip_byte(largest_file(folder / "2" / "params"))
    before = snapshot(folder)
    assert tool.main([str(folder.parent)]) == 4
    assert "step 2: damaged: params/" in capsys.readouterr().out
    assert tool.main([str(folder / "3")]) == 0
    assert snapshot(folder) == before
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "file_sha256", failing(checkpoint.file_sha256, "/3/params/", errno.EACCES))
        assert tool.main([str(folder / "3")]) == 2
        assert tool.main([str(folder)]) == 4
    assert "step 3: not read: " in capsys.readouterr().out
    assert tool.main([str(folder / "nowhere")]) == 3
    assert capsys.readouterr().err.startswith("error: ")


# --- killed ------------------------------------------------------------------------------------------

KILLED = """
import sys, time
sys.path.insert(0, sys.argv[1])
from test_checkpoint import make_state, open_folder
writer = open_folder(sys.argv[2])
for step in range(1, 1000):
    writer.save(make_state(step, width=1024), step)
    print(step, flush=True)
    if step % 3 == 0:
        writer.wait()
"""


def kill_while_saving(folder, delays_s):
    """SIGKILL a process that does nothing but save; after each kill the newest step is whole. Returns steps."""
    found = []
    for delay_s in delays_s:
        shutil.rmtree(folder, ignore_errors=True)
        command = [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(folder)]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        started = [int(child.stdout.readline()) for _ in range(3)][-1]
        try:
            child.wait(timeout=delay_s)
            raise AssertionError("the writer ended by itself")
        except subprocess.TimeoutExpired:
            child.kill()
        rest = child.stdout.read().split()
        child.wait()
        child.stdout.close()
        last_started = int(rest[-1]) if rest else started
        restored = open_folder(folder).restore_latest(abstract(make_state(0, width=1024)))
        assert restored is not None, "step 1 was on the disk before step 2 began"
        state, step, ledger = restored
        assert_same_bits(state, make_state(step, width=1024))
        assert not ledger.entries, "a kill is not damage"
        assert step >= last_started - 1, "nothing is lost beyond the save that was under way"
        assert not list(folder.glob("*tmp*"))
        found.append(step)
    return found


def test_sigkill_while_saving(tmp_path):
    kill_while_saving(tmp_path / "checkpoints", [0.05, 0.17])


@pytest.mark.slow
def test_sigkill_while_saving_thirty_times(tmp_path):
    delays_s = np.random.default_rng(0).uniform(0.0, 0.6, 30)
    assert len(set(kill_while_saving(tmp_path / "checkpoints", delays_s.tolist()))) > 1
