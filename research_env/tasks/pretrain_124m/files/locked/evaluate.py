"""Mean loss on held-out tokens, from the logits of the candidate's model in another process."""

import os
import sys

import numpy as np

sys.path.insert(0, os.environ["JUDGE"])
import judge  # noqa: E402

ROW = 1024
VOCAB = 50304


def evaluate():
    """Nats per token."""
    path = {"search": "locked/validation.bin", "final": "final/test.bin"}[os.environ["SPLIT"]]
    data = np.fromfile(path, np.uint16).astype(np.int32)
    rows = data[: len(data) // (ROW + 1) * (ROW + 1)].reshape(-1, ROW + 1)
    # Rows go one by one, so that a row is always served by the same program: the same tokens give the same bits.
    return judge.mean_loss(
        judge.open_servers(), rows, VOCAB, batch_rows=1, num_cuts=len(rows), tolerance=1e-3
    )


judge.main(evaluate)
