"""Laws of the mesh: any mesh of eight devices gives the loss, the gradients and the privacy of documents of one device.

One program a mesh serves all of them: loss, gradients and hidden vectors of packed rows. Its collectives are counted
against tests/golden/collectives.json, an upper bound for each minor version of jax; renew it, after a look at every
number that grew, with `python tests/pretrain/model/test_meshes.py`.
"""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from pretrain.collectives import count, find_collectives
from pretrain.config import ConfigError
from pretrain.data.batch import Batch
from pretrain.loss import LossConfig, cross_entropy
from pretrain.model import layers
from pretrain.model.moe import LossBalance, MoeConfig
from pretrain.model.transformer import (
    ModelConfig,
    forward_with_router,
    head_DV,
    init_params,
    param_shardings,
)
from pretrain.sharding import ACTIVATION_RULES, MeshConfig, OnMesh, make_mesh, partition_spec

GOLDEN = Path(__file__).parents[2] / "golden" / "collectives.json"
JAX_MINOR = ".".join(jax.__version__.split(".")[:2])
# What the partitioner does is what is tested, not how well LLVM compiles it.
QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
VOCAB, ROWS, LENGTH = 64, 8, 16
# Three layers: no other loop of the program has three trips.
LAYERS = 3
DENSE = ModelConfig(
    num_layers=LAYERS, width=32, num_heads=8, num_kv_heads=2, head_width=8, hidden_width=32,
    dtype="float32", attention_impl="xla", remat="full",
)  # fmt: skip
MODELS = {
    "dense": DENSE,
    "tied": dataclasses.replace(DENSE, tied_head=True),
    "ring": dataclasses.replace(DENSE, context_attention="ring", attention_impl="auto"),
    "canon": dataclasses.replace(DENSE, short_conv=4),
    "experts": dataclasses.replace(
        DENSE, moe=MoeConfig(num_experts=4, num_active=2, balance=LossBalance(weight=0.1), z_weight=0.01)
    ),
}
MESHES = {
    "fsdp8": MeshConfig(fsdp=8),
    "fsdp4-tensor2": MeshConfig(fsdp=4, tensor=2),
    "replica2-fsdp2-tensor2": MeshConfig(replica=2, fsdp=2, tensor=2),
    "fsdp2-context4": MeshConfig(fsdp=2, context=4),
    "fsdp2-expert4": MeshConfig(fsdp=2, expert=4),
    "tensor8": MeshConfig(fsdp=1, tensor=8),
}
COUNTED = [(model, mesh) for model in ("dense", "experts") for mesh in MESHES]
# A tied table differs at the lookup and at the head alone, a ring and short convolutions over context and tensor.
NAMES = [
    *COUNTED, ("tied", "fsdp4-tensor2"), ("tied", "tensor8"), ("ring", "fsdp2-context4"),
    ("canon", "fsdp2-context4"), ("canon", "fsdp4-tensor2"),
]  # fmt: skip
# Compiling them all takes minutes; one of them guards the default suite.
DEFAULT = ("dense", "fsdp4-tensor2")


def pairs(names):
    return [
        pytest.param(*pair, id="-".join(pair), marks=() if pair == DEFAULT else pytest.mark.slow)
        for pair in names
    ]


def packed_batch() -> Batch:
    """Rows of three documents and padding; the middle one of row 0 is what the leak test changes."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCAB, (ROWS, LENGTH + 1)).astype(np.int32)
    segments = np.repeat([[1] * 5 + [2] * 6 + [3] * 4 + [0] * 2], ROWS, axis=0).astype(np.int32)
    positions = np.repeat([[*range(5), *range(6), *range(4), 0, 0]], ROWS, axis=0).astype(np.int32)
    inside = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    return Batch(tokens, segments, positions, inside.astype(np.float32), np.zeros(ROWS, np.int32))


def value_gradients_hidden(model: ModelConfig):
    """(params, batch) -> (objective, gradients, hidden vectors)."""

    def objective(params, batch):
        hidden, router = forward_with_router(
            params,
            model,
            batch.tokens_BT1[:, :-1],
            batch.positions_BT1[:, :-1],
            batch.segment_ids_BT1[:, :-1],
        )
        sums = cross_entropy(
            hidden, head_DV(params, model), batch.tokens_BT1[:, 1:], batch.weights_BT, batch.source_B,
            num_sources=1, z_weight=LossConfig().z_weight, chunk_tokens=1024,
        )  # fmt: skip
        if router is None:
            return sums.objective, hidden
        return sums.objective + sums.with_router(router, model.moe).router_objective, hidden

    def run(params, batch):
        (value, hidden), gradients = jax.value_and_grad(objective, has_aux=True)(params, batch)
        return value, gradients, hidden

    return run


@dataclasses.dataclass(frozen=True)
class Program:
    """The compiled program of one model on one mesh."""

    run: object
    hlo: str
    mesh_shape: dict
    place: object

    def __call__(self, batch):
        return jax.device_get(self.run(self.place(batch)))


def with_taps(path, value):
    """Short convolutions begin as the identity, which would hide them."""
    return value + 0.3 if path[-1].key == "taps" else value


def compiled(model: ModelConfig, mesh_config: MeshConfig | None) -> Program:
    mesh = None if mesh_config is None else make_mesh(mesh_config)
    params = init_params(model, VOCAB, seed=0)
    params = jax.tree_util.tree_map_with_path(with_taps, params)
    if mesh is not None:
        params = jax.device_put(params, param_shardings(params, mesh))

    def place(batch):
        if mesh is None:
            return batch

        def put(x):
            dims = ("batch", *[None] * (x.ndim - 1))
            return jax.device_put(
                x, NamedSharding(mesh, partition_spec(dims, x.shape, ACTIVATION_RULES, mesh))
            )

        return jax.tree.map(put, batch)

    function = OnMesh(jax.jit(value_gradients_hidden(model)), mesh)
    run = function.lower(params, place(packed_batch())).compile(QUICKLY)
    return Program(
        functools.partial(run, params), run.as_text() or "", {} if mesh is None else dict(mesh.shape), place
    )


@functools.cache
def program(model_name: str, mesh_name: str | None) -> Program:
    return compiled(MODELS[model_name], None if mesh_name is None else MESHES[mesh_name])


@functools.cache
def outputs(model_name: str, mesh_name: str | None):
    return program(model_name, mesh_name)(packed_batch())


@pytest.mark.parametrize(("model", "mesh"), pairs(NAMES))
def test_any_mesh_gives_the_loss_and_gradients_of_one_device(model, mesh):
    expected, got = outputs("dense" if model == "ring" else model, None), outputs(model, mesh)
    assert got[0] == pytest.approx(expected[0], rel=1e-5)
    for (path, e), g in zip(
        jax.tree_util.tree_leaves_with_path(expected[1]), jax.tree.leaves(got[1]), strict=True
    ):
        np.testing.assert_allclose(g, e, rtol=0, atol=1e-5 * max(np.abs(e).max(), 1e-3), err_msg=str(path))


@pytest.mark.parametrize(("model", "mesh"), pairs(NAMES))
def test_a_changed_document_changes_no_other_on_any_mesh(model, mesh):
    batch = packed_batch()
    tokens = batch.tokens_BT1.copy()
    tokens[0, 6] = (tokens[0, 6] + 1) % VOCAB
    before = outputs(model, mesh)[2]
    after = program(model, mesh)(dataclasses.replace(batch, tokens_BT1=tokens))[2]
    same = (before == after).all(axis=-1)
    assert not same[0, 6:11].any()  # the changed document from the change on
    assert same[0, :6].all()
    assert same[1:].all()
    assert same[0, 11:].all()


def counted(p: Program) -> dict[str, dict[str, int]]:
    found = find_collectives(p.hlo, p.mesh_shape)
    of_layers = count([c for c in found if LAYERS in c.loop_trips])
    everywhere = count(found)
    outside = {
        kind: n - of_layers.get(kind, 0) for kind, n in everywhere.items() if n > of_layers.get(kind, 0)
    }
    return {"in a layer": of_layers, "outside": outside}


def excess(counts: dict[str, dict[str, int]], bound: dict[str, dict[str, int]]) -> list[str]:
    """What there is more of than allowed."""
    return [
        f"{number} x {kind} {where}, {bound[where].get(kind, 0)} allowed"
        for where, kinds in counts.items()
        for kind, number in kinds.items()
        if number > bound[where].get(kind, 0)
    ]


def bound_of(model: str, mesh: str) -> dict[str, dict[str, int]]:
    golden = json.loads(GOLDEN.read_text())
    if JAX_MINOR not in golden:
        pytest.skip(f"tests/golden/collectives.json has no counts for jax {JAX_MINOR}")
    return golden[JAX_MINOR][f"{model}-{mesh}"]


@pytest.mark.parametrize(("model", "mesh"), pairs(COUNTED))
def test_a_layer_has_no_more_collectives_than_the_golden_file_says(model, mesh):
    """A layer forward and backward, recomputation included."""
    assert not excess(counted(program(model, mesh)), bound_of(model, mesh))


def test_an_extra_gather_in_a_layer_is_refused(monkeypatch):
    """The count has power: a layer that gathers its weights once more than it must does not pass."""
    once = layers.use_weight

    def twice(weight, dims, dtype):
        return (once(weight, dims, dtype) + once(1.5 * weight, dims, dtype)) / 2.5

    monkeypatch.setattr(layers, "use_weight", twice)
    planted = counted(compiled(MODELS[DEFAULT[0]], MESHES[DEFAULT[1]]))
    (line,) = (line for line in excess(planted, bound_of(*DEFAULT)) if "in a layer" in line)
    assert "all-gather" in line


def test_heads_that_tensor_does_not_divide_are_one_clear_line():
    mesh = make_mesh(MESHES["tensor8"])
    model = dataclasses.replace(DENSE, num_heads=6, num_kv_heads=2)
    with pytest.raises(ConfigError, match="heads must divide evenly over the mesh axes tensor"):
        init_params(model, VOCAB, seed=0, mesh=mesh)


def test_a_mesh_that_does_not_multiply_is_one_clear_line():
    with pytest.raises(ConfigError, match="must multiply to the number of devices, 8"):
        make_mesh(MeshConfig(fsdp=3, tensor=2))


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    stored = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    stored[JAX_MINOR] = {"-".join(names): counted(program(*names)) for names in COUNTED}
    GOLDEN.write_text(json.dumps(stored, indent=1) + "\n")
