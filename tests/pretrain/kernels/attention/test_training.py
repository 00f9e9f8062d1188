"""The trainer on our kernels: twenty steps give the loss curve of XLA, packed rows included; one plan serves all layers."""

import functools

import jax
import numpy as np
import pytest

from pretrain.data.batch import Batch
from pretrain.loss import LossConfig
from pretrain.model.transformer import LayerKind, ModelConfig, abstract_params, forward
from pretrain.optim import AdamWConfig, OptimConfig, WarmupCosine, make_optimizer
from pretrain.sharding import MeshConfig, make_mesh
from pretrain.step import init_state, language_model_loss, make_train_step

VOCAB, ROWS, LENGTH, STEPS = 32, 4, 32, 20


def batches():
    """Counting rows cut into documents, the end padded."""
    rng = np.random.default_rng(0)
    place = np.arange(LENGTH + 1, dtype=np.int32)[None]
    for _ in range(STEPS):
        cut = rng.integers(5, 25, (ROWS, 1)).astype(np.int32)
        segments = (np.where(place < cut, 1, 2) * (place < LENGTH - 2)).astype(np.int32)
        start = rng.integers(0, VOCAB, (ROWS, 1))
        yield Batch(
            tokens_BT1=((3 * place + start) % VOCAB).astype(np.int32),
            segment_ids_BT1=segments,
            positions_BT1=np.where(place < cut, place, place - cut).astype(np.int32),
            weights_BT=((segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)).astype(np.float32),
            source_B=np.zeros(ROWS, np.int32),
        )


def model_of(impl, head_width=8, dtype="float32"):
    return ModelConfig(
        num_layers=2, width=16, num_heads=2, num_kv_heads=1, head_width=head_width, hidden_width=32, dtype=dtype,
        attention_impl=impl, layer_pattern=(LayerKind(window=9),),
    )  # fmt: skip


def losses(impl):
    model = model_of(impl)
    config = OptimConfig(method=AdamWConfig(), peak_lr=1e-2, schedule=WarmupCosine(num_warmup_steps=3))
    optimizer = make_optimizer(config, STEPS, abstract_params(model, VOCAB), model)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    step = make_train_step(
        language_model_loss(model, LossConfig(chunk_tokens=64), num_sources=1), optimizer, mesh=mesh
    )
    state = init_state(model, VOCAB, optimizer, 3, mesh)
    curve = []
    for batch in batches():
        state, metrics = step(state, batch)
        curve.append(float(metrics["loss"]))
    return np.array(curve)


@pytest.mark.slow
def test_twenty_steps_equal_xla():
    ours, theirs = losses("tpu_interpret"), losses("xla")
    assert theirs[-1] < 0.8 * theirs[0]
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def primitives(jaxpr, inside=False):
    """Names of what the layers' scan runs, kernels apart."""
    found = set()
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name in ("pallas_call", "core_map", "mosaic_gpu"):
            continue
        if inside:
            found.add(name)
        for part in jax.tree.leaves(eqn.params, is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")):
            part = getattr(part, "jaxpr", part)
            if hasattr(part, "eqns"):
                found |= primitives(part, inside or name == "scan")
    return found


def absent(impl, **axes):
    """A mesh of devices that are not here, of the kind that `impl` runs on."""
    sizes = MeshConfig(**{"fsdp": 1, **axes})
    platform, kind = {
        "pallas_hopper": ("cuda", "NVIDIA H100 80GB HBM3"),
        "pallas_tpu": ("tpu", "TPU v5"),
        "cudnn": ("cuda", "NVIDIA H100 80GB HBM3"),
        "tpu_interpret": ("cpu", "cpu"),
    }[impl]
    names = ("replica", "fsdp", "context", "tensor", "expert")
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=1, platform=platform)
    return jax.sharding.use_abstract_mesh(
        jax.sharding.AbstractMesh(
            tuple(getattr(sizes, name) for name in names),
            names,
            (jax.sharding.AxisType.Explicit,) * 5,
            abstract_device=device,
        )
    )


@pytest.mark.parametrize("impl", ["tpu_interpret", "pallas_hopper"])
def test_one_plan_serves_all_layers(impl):
    """What depends on the packing alone is computed before the layers, not in each of them."""
    model = model_of(impl, head_width=64, dtype="bfloat16")
    ids, params = jax.ShapeDtypeStruct((2, 256), np.int32), abstract_params(model, VOCAB)
    with absent(impl):
        traced = jax.jit(functools.partial(forward, config=model)).trace(
            params, tokens_BT=ids, positions_BT=ids, segment_ids_BT=ids
        )
    in_layers = primitives(traced.jaxpr.jaxpr)
    assert "dot_general" in in_layers
    # Ranges of blocks are minima and maxima over blocks, lists of them are running sums.
    assert not {"cumsum", "cummax", "cummin", "reduce_min", "argsort", "sort"} & in_layers


def test_packed_rows_by_cudnn_are_refused_and_no_document_sees_another():
    """The trainer always gives segment ids; a name that cannot serve them stops before the first step."""
    model = model_of("cudnn", head_width=64, dtype="bfloat16")
    ids, params = jax.ShapeDtypeStruct((2, 256), np.int32), abstract_params(model, VOCAB)
    with absent("cudnn"), pytest.raises(ValueError, match="'cudnn' cannot do this: has no packed rows: "):
        jax.eval_shape(
            functools.partial(forward, config=model),
            params,
            tokens_BT=ids,
            positions_BT=ids,
            segment_ids_BT=ids,
        )


@pytest.mark.parametrize(
    ("impl", "axes"),
    [
        ("pallas_hopper", {"fsdp": 2, "tensor": 2}),
        ("pallas_hopper", {"fsdp": 2, "context": 2}),
        ("pallas_tpu", {"fsdp": 2, "tensor": 2}),
    ],
)
def test_layers_lower_on_a_mesh(impl, axes):
    """Every device makes the ranges of its rows (over context: of its queries), and its kernels take them."""
    model = model_of(impl, head_width=64, dtype="bfloat16")
    ids, params = jax.ShapeDtypeStruct((4, 256), np.int32), abstract_params(model, VOCAB)

    def loss(params, ids):
        return forward(params, model, ids, ids, ids).astype(np.float32).sum()

    with absent(impl, **axes):
        traced = jax.jit(jax.grad(loss)).trace(params, ids)
        text = traced.lower(lowering_platforms=("cuda" if impl == "pallas_hopper" else "tpu",)).as_text()
    assert (
        text.count("custom_call @mosaic_gpu" if impl == "pallas_hopper" else "custom_call @tpu_custom_call")
        == 3
    )
