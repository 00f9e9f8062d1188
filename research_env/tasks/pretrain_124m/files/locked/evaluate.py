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
    # bfloat16 has 8 bits: logits of the same row differ by a hundredth between batches.
    return judge.mean_loss(judge.open_servers(), rows, VOCAB, batch_rows=1, num_cuts=32, tolerance=5e-2)


judge.main(evaluate)
