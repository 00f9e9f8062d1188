"""Mean loss on held-out bytes, from the logits of the candidate's model in another process."""

import os
import sys

import numpy as np

sys.path.insert(0, os.environ["JUDGE"])
import judge  # noqa: E402

ROW, VOCAB = 64, 128


def evaluate():
    """Nats per byte."""
    path = {"search": "locked/validation.bin", "final": "final/test.bin"}[os.environ["SPLIT"]]
    data = np.fromfile(path, np.uint8).astype(np.int32)
    rows = data[: len(data) // (ROW + 1) * (ROW + 1)].reshape(-1, ROW + 1)
    return judge.mean_loss(
        judge.open_servers(), rows, VOCAB, batch_rows=64, num_cuts=len(rows), tolerance=1e-3
    )


judge.main(evaluate)
