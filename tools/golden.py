"""Golden curves: does a refactoring change a single bit?

python -m tools.golden compare [COMMIT]   the working tree against a commit (HEAD), on this machine, bit by bit
python -m tools.golden losses             print the curve of this tree
python -m tools.golden write              store it in tests/golden/tiny_loss.json (a change of numbers on purpose)

The tests hold the stored curve to 1e-5 relative, because bits differ between processors and versions of JAX.
Here both trees run side by side with the same ones, so a refactoring has to agree bit for bit.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
STORED = ROOT / "tests" / "golden" / "tiny_loss.json"
NUM_STEPS = 50


def tiny_curve() -> dict[str, list[float]]:
    """Loss and gradient norm of 50 steps of a tiny model with everything on: packing, two sources, Muon."""
    # Imported here: `compare` runs this in two trees and must not hold either of them itself.
    import jax
    import numpy as np

    from pretrain.data.batch import Batch
    from pretrain.loss import LossConfig
    from pretrain.model.transformer import ModelConfig, abstract_params
    from pretrain.optim import MuonConfig, OptimConfig, Wsd, make_optimizer
    from pretrain.sharding import MeshConfig, make_mesh
    from pretrain.step import init_state, language_model_loss, make_train_step

    vocab_size, num_rows, row_length = 64, 8, 48
    model = ModelConfig(
        num_layers=2, width=32, num_heads=4, num_kv_heads=2, head_width=8, hidden_width=64, dtype="float32"
    )
    optim = OptimConfig(method=MuonConfig(), peak_lr=5e-3, schedule=Wsd(num_warmup_steps=5))
    optimizer = make_optimizer(optim, NUM_STEPS, abstract_params(model, vocab_size), model)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    loss = language_model_loss(model, LossConfig(z_weight=1e-4, chunk_tokens=64), num_sources=2)
    train_step = make_train_step(loss, optimizer, mesh=mesh, num_microbatches=2)
    state = init_state(model, vocab_size, optimizer, 7, mesh)

    # Raw bits of a bit generator are the one thing numpy promises never to change.
    bits = np.random.PCG64(11)
    shape = (num_rows, row_length + 1)

    def batch() -> Batch:
        noise = (bits.random_raw(shape[0] * shape[1]) % 3).astype(np.int32).reshape(shape)
        tokens = np.zeros(shape, np.int32)
        for t in range(1, shape[1]):
            tokens[:, t] = (5 * tokens[:, t - 1] + 7 + noise[:, t]) % vocab_size
        cut = 10 + (bits.random_raw(num_rows) % 30).astype(np.int32)[:, None]
        place = np.arange(shape[1], dtype=np.int32)[None]
        segment_ids = np.where(place < cut, 1, 2) * (place < shape[1] - 3)
        return Batch(
            tokens_BT1=tokens,
            segment_ids_BT1=segment_ids.astype(np.int32),
            positions_BT1=np.where(place < cut, place, place - cut).astype(np.int32),
            weights_BT=((segment_ids[:, 1:] == segment_ids[:, :-1]) & (segment_ids[:, 1:] > 0)).astype(
                np.float32
            ),
            source_B=np.arange(num_rows, dtype=np.int32) % 2,
        )

    curve: dict[str, list[float]] = {"loss": [], "grad_norm": []}
    for _ in range(NUM_STEPS):
        state, metrics = train_step(state, batch())
        for name, values in curve.items():
            values.append(float(metrics[name]))
    return curve


def curve_of(tree: Path) -> dict[str, list[float]]:
    """The curve that the golden tool of another tree prints."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(tree / "tools" / "golden.py"), "losses"]
    return json.loads(
        subprocess.run(command, env=environment, cwd=tree, check=True, stdout=subprocess.PIPE).stdout
    )


def differences(old: dict[str, list[float]], new: dict[str, list[float]]) -> list[str]:
    """A line for each step at which some number has other bits."""
    lines = []
    for name in old.keys() | new.keys():
        pairs = zip(old.get(name, []), new.get(name, []), strict=False)
        for step, (before, after) in enumerate(pairs, start=1):
            if before.hex() != after.hex():
                lines.append(
                    f"step {step:3} {name:10} {before!r:>24} -> {after!r:>24}  {after / before - 1:+.1e}"
                )
        if len(old.get(name, [])) != len(new.get(name, [])):
            lines.append(f"{name} has {len(old.get(name, []))} values before, {len(new.get(name, []))} after")
    return lines


def compare(commit: str) -> int:
    """Print every difference between `commit` and the working tree; 1 if there is one."""
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            tar.extractall(folder, filter="data")
        lines = differences(curve_of(Path(folder)), curve_of(ROOT))
    print("\n".join(lines) if lines else f"the same bits as {commit} in {NUM_STEPS} steps")
    return 1 if lines else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("verb", choices=["compare", "losses", "write"])
    parser.add_argument("commit", nargs="?", default="HEAD")
    arguments = parser.parse_args()
    if arguments.verb == "compare":
        return compare(arguments.commit)
    text = json.dumps(tiny_curve(), indent=1)
    if arguments.verb == "write":
        STORED.write_text(text + "\n")
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
