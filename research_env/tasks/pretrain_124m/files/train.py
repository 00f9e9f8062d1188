"""Train the recipe's model on all devices of the lease, on random rows of the tokens, then leave its weights in $OUT."""

import os

import jax
import numpy as np
import recipe
import weights

from pretrain.data.batch import Batch
from pretrain.model.transformer import abstract_params
from pretrain.optim import make_optimizer
from pretrain.sharding import ACTIVATION_RULES, MeshConfig, make_mesh, partition_spec
from pretrain.step import init_state, language_model_loss, make_train_step


def batches(data, rng, mesh):
    """Rows that start anywhere; every token counts. The same rows whatever the number of devices."""
    shape = (recipe.BATCH, recipe.ROW + 1)
    fixed = {
        "segment_ids_BT1": np.ones(shape, np.int32),
        "positions_BT1": np.tile(np.arange(shape[1], dtype=np.int32), (shape[0], 1)),
        "weights_BT": np.ones((shape[0], recipe.ROW), np.float32),
        "source_B": np.zeros(shape[0], np.int32),
    }
    spec = partition_spec(("batch",), (recipe.BATCH,), ACTIVATION_RULES, mesh)
    sharding = jax.sharding.NamedSharding(mesh, spec)
    while True:
        starts = rng.integers(0, len(data) - recipe.ROW, recipe.BATCH)
        tokens = data[starts[:, None] + np.arange(shape[1])].astype(np.int32)
        yield jax.device_put(Batch(tokens_BT1=tokens, **fixed), sharding)


def main():
    """`recipe.STEPS` steps."""
    seed = int(os.environ["SEED"])
    data = np.memmap(os.path.join(os.environ["DATA"], "train.bin"), np.uint16, "r")
    mesh = make_mesh(MeshConfig())
    shapes = abstract_params(recipe.MODEL, recipe.VOCAB)
    optimizer = make_optimizer(recipe.OPTIM, recipe.STEPS, shapes, recipe.MODEL)
    state = init_state(recipe.MODEL, recipe.VOCAB, optimizer, seed % 2**31, mesh)
    loss = language_model_loss(recipe.MODEL, recipe.LOSS, 1)
    step = make_train_step(loss, optimizer, mesh=mesh, num_microbatches=recipe.MICROBATCHES)
    source = batches(data, np.random.default_rng(seed), mesh)
    for number in range(recipe.STEPS):
        state, metrics = step(state, next(source))
        if number % 50 == 0:
            print(f"step {number} loss {float(metrics['loss']):.4f}", flush=True)
    weights.save(os.path.join(os.environ["OUT"], "model.safetensors"), jax.device_get(state.params))


if __name__ == "__main__":
    main()
