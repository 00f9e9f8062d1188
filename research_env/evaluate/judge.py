"""What an evaluator needs, in one file that imports numpy and nothing of ours: it is mounted into the judge's jail.

A locked evaluator does `import judge` (the folder $JUDGE is put on its path) and talks to the candidate's model through
`open_servers`. The model is untrusted code in other processes: it gets tokens, it returns arrays whose shape and type the
judge dictates, and the score is computed here.
"""

import json
import math
import os
import struct
import sys
from typing import Any, NoReturn

import numpy as np


class Invalid(Exception):
    """The candidate broke the contract; the result is METRIC_INVALID."""


class Server:
    """One process of the candidate's model, reached by two pipes."""

    def __init__(self, read_fd: int, write_fd: int):
        self._read = os.fdopen(read_fd, "rb", buffering=0)
        self._write = os.fdopen(write_fd, "wb", buffering=0)

    def logits(self, tokens_BT: np.ndarray, vocab_size: int) -> np.ndarray:
        """float32 [B, T, V] for int32 [B, T].

        Raises:
          Invalid: the server ended, or its frame has another length, or it holds a NaN.
        """
        num_rows, num_tokens = tokens_BT.shape
        header = struct.pack("<4sII", b"TOKS", num_rows, num_tokens)
        try:
            self._send(header + tokens_BT.astype("<i4").tobytes())
        except (BrokenPipeError, OSError) as error:
            raise Invalid("the model's server ended") from error
        num_bytes = num_rows * num_tokens * vocab_size * 4
        announced = struct.unpack("<Q", self._receive(8))[0]
        if announced != num_bytes:
            raise Invalid(f"a frame of {num_bytes} bytes was asked for, {announced} were announced")
        logits_BTV = np.frombuffer(self._receive(num_bytes), "<f4").reshape(num_rows, num_tokens, vocab_size)
        if not np.isfinite(logits_BTV).all():
            raise Invalid("logits must be finite")
        return logits_BTV

    def _send(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[self._write.write(view) :]

    def _receive(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            more = self._read.read(min(count - len(data), 1 << 20))
            if not more:
                raise Invalid("the model's server ended inside a frame")
            data += more
        return bytes(data)


def open_servers() -> list[Server]:
    """The candidate's model processes; they share nothing with each other."""
    pairs = [pair.split(":") for pair in os.environ["SERVERS"].split(",") if pair]
    return [Server(int(read), int(write)) for read, write in pairs]


def mean_loss(
    servers: list[Server],
    tokens_RT1: np.ndarray,
    vocab_size: int,
    *,
    batch_rows: int,
    num_cuts: int,
    tolerance: float,
) -> float:
    """Mean nats per token over all rows, after testing that logits look at nothing ahead.

    A suffix of `num_cuts` rows is replaced and the row goes to the second server: logits before the cut must agree within
    `tolerance` (absolute). With n cuts a model that looks ahead on a share f of positions escapes with probability
    (1 - f)^n; one that looks ahead everywhere, by less than the tolerance, gains up to 2 * tolerance nats a token. So
    `num_cuts` is best all rows, and `tolerance` less than half of the task's `min_delta`.

    Raises:
      Invalid: the model broke the contract.
      ValueError: there is one server only, which would remember what it was asked first.
    """
    if len(servers) < 2:
        raise ValueError(
            f"the test needs two servers that share nothing, got {len(servers)}; write servers = 2"
        )
    rng = np.random.default_rng(int(os.environ["JUDGE_SEED"]))
    total, count = 0.0, 0
    first, second = servers[0], servers[-1]
    cut_rows = set(rng.choice(len(tokens_RT1), size=min(num_cuts, len(tokens_RT1)), replace=False).tolist())
    for start in range(0, len(tokens_RT1), batch_rows):
        batch_BT1 = tokens_RT1[start : start + batch_rows]
        inputs_BT, targets_BT = batch_BT1[:, :-1], batch_BT1[:, 1:]
        logits_BTV = first.logits(inputs_BT, vocab_size)
        total += float(token_losses(logits_BTV, targets_BT).sum())
        count += targets_BT.size
        rows = [row for row in range(len(batch_BT1)) if start + row in cut_rows]
        if rows:
            changed_BT = inputs_BT.copy()
            cuts = rng.integers(1, inputs_BT.shape[1], size=len(rows))
            for row, cut in zip(rows, cuts, strict=True):
                changed_BT[row, cut:] = rng.integers(0, vocab_size, size=inputs_BT.shape[1] - cut)
            # The whole batch goes, in another order, so that a server cannot tell a test from a row to be scored.
            order = rng.permutation(len(changed_BT))
            again_BTV = np.empty_like(logits_BTV)
            again_BTV[order] = second.logits(changed_BT[order], vocab_size)
            for row in range(len(batch_BT1)):
                end = cuts[rows.index(row)] if row in rows else inputs_BT.shape[1]
                gap = float(np.abs(again_BTV[row, :end] - logits_BTV[row, :end]).max())
                if gap > tolerance:
                    raise Invalid(
                        f"logits before a cut changed by {gap:.3g} with the tokens after it: the model looks ahead"
                    )
    return total / count


def token_losses(logits_BTV: np.ndarray, targets_BT: np.ndarray) -> np.ndarray:
    """-log softmax at the targets, float64 [B, T]; the softmax is ours, so a model cannot report its own loss."""
    logits = logits_BTV.astype(np.float64)
    top = logits.max(axis=-1, keepdims=True)
    log_z = np.log(np.exp(logits - top).sum(axis=-1)) + top[..., 0]
    return log_z - np.take_along_axis(logits, targets_BT[..., None].astype(np.int64), axis=-1)[..., 0]


def report(metric: float, **extra: float) -> None:
    """Write the result to the harness's channel: numbers and nothing else."""
    fields: dict[str, Any] = {
        "metric": float(metric),
        "extra": {key: float(value) for key, value in extra.items()},
    }
    if not math.isfinite(fields["metric"]):
        raise Invalid(f"the metric must be finite, got {metric}")
    _write(fields)


def reject(reason: str) -> None:
    """Say that the candidate broke the contract."""
    _write({"invalid": reason[:300]})


def _write(fields: dict[str, Any]) -> None:
    path = os.environ["RESULT"]
    with open(path + ".part", "w") as file:
        json.dump(fields, file)
    os.replace(path + ".part", path)


def main(evaluate: Any) -> NoReturn:
    """Run an evaluator: its number is reported, a broken contract is rejected."""
    try:
        report(evaluate())
    except Invalid as error:
        reject(str(error))
    sys.exit(0)
