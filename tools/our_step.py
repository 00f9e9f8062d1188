"""Our own training step as an entrant of bench_step: the real `pretrain.step` on packed synthetic rows."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from pretrain.allocator import keep_heap
from pretrain.data.batch import Batch
from pretrain.loss import LossConfig
from pretrain.model.transformer import ModelConfig, abstract_params
from pretrain.optim import OptimConfig, WarmupCosine, make_optimizer
from pretrain.sharding import MeshConfig, make_mesh
from pretrain.step import init_state, language_model_loss, make_train_step

NUM_STEPS = 100_000


def model_config(shape: Mapping[str, int]) -> ModelConfig:
    """Our decoder at the sizes of `shape`, with as many parameters as a peer with learned positions.

    A gated feed-forward has three matrices, so its hidden width is smaller: the multiple of 32 that brings the
    number of parameters nearest to that of the peer.
    """
    D, L, N, F, T = (shape[letter] for letter in "DLNFT")
    return ModelConfig(
        num_layers=L,
        width=D,
        num_heads=N,
        num_kv_heads=N,
        head_width=D // N,
        hidden_width=32 * round((T * D + 2 * L * D * F) / (3 * L * D) / 32),
        tied_head=True,
        dtype="float32",
        scan_layers=False,
    )


def rows(shape: Mapping[str, int], seed: int = 0) -> Batch:
    """B packed rows of random tokens, three documents in each; every target counts."""
    B, T1, V = shape["B"], shape["T"] + 1, shape["V"]
    random = np.random.default_rng(seed)
    segment_ids = np.sort(random.integers(1, 4, (B, T1), np.int32), axis=1)
    first = segment_ids[:, :, None] == segment_ids[:, None, :]
    positions = np.arange(T1, dtype=np.int32)[None] - first.argmax(axis=2).astype(np.int32)
    return Batch(
        tokens_BT1=random.integers(0, V, (B, T1), np.int32),
        segment_ids_BT1=segment_ids,
        positions_BT1=positions,
        weights_BT=np.ones((B, T1 - 1), np.float32),
        source_B=np.zeros(B, np.int32),
    )


def factory(shape: Mapping[str, int]) -> tuple[Callable[[], float], dict[str, Any]]:
    """The entrant: health guard, metrics, segment mask, schedule and kept heap, as in a run of `pretrain.main`."""
    keep_heap()
    model = model_config(shape)
    optim = OptimConfig(peak_lr=1e-3, schedule=WarmupCosine(num_warmup_steps=1000))
    params = abstract_params(model, shape["V"])
    optimizer = make_optimizer(optim, NUM_STEPS, params, model)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    train_step = make_train_step(
        language_model_loss(model, LossConfig(chunk_tokens=shape["B"] * shape["T"]), num_sources=1),
        optimizer,
        mesh=mesh,
        learning_rate=lambda step: optim.learning_rate(step, NUM_STEPS),
    )
    state = init_state(model, shape["V"], optimizer, 0, mesh)
    batch = jax.device_put(rows(shape))

    def step() -> float:
        nonlocal state
        state, metrics = train_step(state, batch)
        return float(metrics["loss"])

    num_params = sum(int(leaf.size) for leaf in jax.tree.leaves(params))
    return step, {"params": num_params, "hidden_width": model.hidden_width}
