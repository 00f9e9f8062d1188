"""How likely a model finds a text after another: many short requests packed into rows of one shape.

Requests lie in a row as documents do in training, told apart by segment ids, so one program is compiled and little is
computed on padding. The last token of a request is scored and not read. Several continuations of one context each carry
their own copy of it. Logits are made for the tokens that are scored and no others: of a question with its answer that is
a part, and the head is dear.

B rows, T time, C scored positions of a row, c of them at a time, V vocabulary.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from pretrain.config import ConfigError
from pretrain.data.pack import first_fit_decreasing
from pretrain.generate import Score
from pretrain.model.transformer import ModelConfig, Params, forward, logits
from pretrain.sharding import DATA_AXES, OnMesh, axis_size, place
from pretrain.tokenizer import Tokenizer

# Logits of this many scored positions of every row exist at a time.
_CHUNK_POSITIONS = 64


class Scorer(Protocol):
    """Scores of the tokens rows[i][starts[i]:]: `PackedScorer`, and `generate.Generator` with its shared prefixes."""

    def score(self, rows: Sequence[Sequence[int]], starts: Sequence[int]) -> list[Score]: ...


class PackedScorer:
    """Scores by full forward passes over packed rows; on a mesh rows lie over the data axes."""

    def __init__(
        self,
        params: Params,
        model: ModelConfig,
        *,
        row_length: int = 512,
        batch_rows: int = 8,
        mesh: Mesh | None = None,
        report: Callable[[int, int], None] = lambda done, total: None,
    ):
        """`report(scored tokens of requests, all of them)` is called after every batch."""
        devices = 1 if mesh is None else axis_size(mesh, DATA_AXES)
        if batch_rows % devices or row_length < 2:
            raise ConfigError(
                f"batch_rows must be a multiple of the {devices} data-parallel devices and row_length at least 2, got "
                f"{batch_rows} and {row_length}"
            )
        self.vocab_size = params["embed"]["embedding"].shape[0]
        self._params, self._row_length, self._batch_rows, self._report = (
            params,
            row_length,
            batch_rows,
            report,
        )
        self._step = OnMesh(jax.jit(functools.partial(_score_rows, model)), mesh)

    def score(self, rows: Sequence[Sequence[int]], starts: Sequence[int]) -> list[Score]:
        """Log-probability of each token from its start on, and whether it was the likeliest; in the order given.

        Raises:
          ConfigError: a start outside [1, length of its row], more than `row_length` tokens to read (all but the last),
            an id out of range.
        """
        self._check(rows, starts)
        scores: dict[int, Score] = {}
        bins = first_fit_decreasing([_num_read(row) for row in rows], self._row_length)
        total, done = sum(map(len, rows)), 0
        for first in range(0, len(bins), self._batch_rows):
            batch = bins[first : first + self._batch_rows]
            tokens_BT, segments_BT, positions_BT = self._lay_out(batch, rows)
            at_BC, targets_BC, num_chunks = self._wanted(batch, rows, starts)
            logprobs_BC, greedy_BC = jax.device_get(
                self._step(self._params, tokens_BT, positions_BT, segments_BT, at_BC, targets_BC, num_chunks)
            )
            for b, members in enumerate(batch):
                at = 0
                for i in members:
                    here = slice(at, at + len(rows[i]) - starts[i])
                    scores[i] = Score(
                        logprobs=tuple(logprobs_BC[b, here].tolist()),
                        greedy=tuple(greedy_BC[b, here].tolist()),
                    )
                    at = here.stop
                    done += len(rows[i])
            self._report(done, total)
        return [scores[i] for i in range(len(rows))]

    def _lay_out(self, batch: Sequence[Sequence[int]], rows: Sequence[Sequence[int]]) -> list[np.ndarray]:
        tokens, segments, positions = (
            np.zeros((self._batch_rows, self._row_length), np.int32) for _ in range(3)
        )
        for b, members in enumerate(batch):
            at = 0
            for segment, i in enumerate(members, 1):
                here = slice(at, at + _num_read(rows[i]))
                tokens[b, here], segments[b, here] = rows[i][: _num_read(rows[i])], segment
                positions[b, here] = np.arange(_num_read(rows[i]))
                at = here.stop
        return [tokens, segments, positions]

    def _wanted(
        self, batch: Sequence[Sequence[int]], rows: Sequence[Sequence[int]], starts: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray, np.int32]:
        """Positions that predict a scored token, in order; those tokens; how many chunks of them there are."""
        whole = -(-self._row_length // _CHUNK_POSITIONS) * _CHUNK_POSITIONS
        at_BC, targets_BC = (np.zeros((self._batch_rows, whole), np.int32) for _ in range(2))
        most = 0
        for b, members in enumerate(batch):
            at = count = 0
            for i in members:
                # Position t predicts token t + 1.
                here = slice(count, count + len(rows[i]) - starts[i])
                at_BC[b, here] = np.arange(at + starts[i] - 1, at + len(rows[i]) - 1)
                targets_BC[b, here] = rows[i][starts[i] :]
                at, count = at + _num_read(rows[i]), here.stop
            most = max(most, count)
        return at_BC, targets_BC, np.int32(-(-most // _CHUNK_POSITIONS))

    def _check(self, rows: Sequence[Sequence[int]], starts: Sequence[int]) -> None:
        faults = []
        for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
            if not 1 <= start <= len(row):
                faults.append(f"row {i}: a start must lie in [1, {len(row)}], got {start}")
            if _num_read(row) > self._row_length:
                faults.append(
                    f"row {i}: a prompt with its continuation, but for its last token, must fit row_length="
                    f"{self._row_length}, got {_num_read(row)} tokens; raise it"
                )
            bad = next((t for t in row if not 0 <= t < self.vocab_size), None)
            if bad is not None:
                faults.append(
                    f"row {i}: token ids must lie in [0, {self.vocab_size}), got {bad}; is it this model's tokenizer?"
                )
        if faults:
            raise ConfigError(*faults)


def _num_read(row: Sequence[int]) -> int:
    """Tokens of a request that the model reads: nothing is predicted from the last one."""
    return max(1, len(row) - 1)


def _score_rows(
    model: ModelConfig,
    params: Params,
    tokens_BT: Int[Array, "B T"],
    positions_BT: Int[Array, "B T"],
    segments_BT: Int[Array, "B T"],
    at_BC: Int[Array, "B C"],
    targets_BC: Int[Array, "B C"],
    num_chunks: Int[Array, ""],
) -> tuple[Float[Array, "B C"], Bool[Array, "B C"]]:
    """For the first chunks of positions at_BC: the log-probability of each target there, and whether none was likelier."""
    hidden_BTD = place(forward(params, model, tokens_BT, positions_BT, segments_BT), ("batch", None, None))
    at_BC, targets_BC = (place(jnp.asarray(x), ("batch", None)) for x in (at_BC, targets_BC))
    time_T = jnp.arange(hidden_BTD.shape[1], dtype=jnp.int32)

    def score(i: Array, found: tuple[Array, Array]) -> tuple[Array, Array]:
        at_Bc, targets_Bc = (
            jax.lax.dynamic_slice_in_dim(x, i * _CHUNK_POSITIONS, _CHUNK_POSITIONS, axis=1)
            for x in (at_BC, targets_BC)
        )
        # Products and no gathers, since rows and vocabulary may lie over devices; the other terms are exact zeros.
        here_BcT = (at_Bc[:, :, None] == time_T[None, None]).astype(hidden_BTD.dtype)
        logits_BcV = logits(jnp.einsum("bct,btd->bcd", here_BcT, hidden_BTD), params, model)
        ids_V = jnp.arange(logits_BcV.shape[2], dtype=jnp.int32)
        hit_BcV = (ids_V[None, None] == targets_Bc[:, :, None]).astype(jnp.float32)
        target_Bc = jnp.sum(logits_BcV * hit_BcV, axis=-1)
        most_Bc = jnp.max(logits_BcV, axis=-1)
        total_Bc = jnp.sum(jnp.exp(logits_BcV - most_Bc[..., None]), axis=-1)
        new = (target_Bc - most_Bc - jnp.log(total_Bc), target_Bc >= most_Bc)
        return jax.tree.map(
            lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, i * _CHUNK_POSITIONS, axis=1), found, new
        )

    empty = (jnp.zeros(at_BC.shape, jnp.float32), jnp.zeros(at_BC.shape, bool))
    return jax.lax.fori_loop(0, num_chunks, score, jax.tree.map(lambda x: place(x, ("batch", None)), empty))


# --- from text to rows -------------------------------------------------------------------------------


def continuation_row(
    tokenizer: Tokenizer, context: str, continuation: str, add_bos: bool
) -> tuple[list[int], int]:
    """The ids of both texts read as one, and where those of the continuation start.

    Blanks at the end of the context go with the continuation, where tokenizers keep them. An empty context is the
    token that begins a text.
    """
    kept = context.rstrip()
    continuation = context[len(kept) :] + continuation
    prefix = [tokenizer.bos_id] if add_bos or not kept else []
    whole = prefix + tokenizer.encode(kept + continuation)
    start = len(prefix) + len(tokenizer.encode(kept))
    if start >= len(whole):
        raise ConfigError(
            f"a continuation must add a token to its context, got {continuation!r} after {kept[-40:]!r}"
        )
    return whole, start


def window_rows(ids: Sequence[int], prefix_id: int, row_length: int) -> list[tuple[list[int], int]]:
    """A long text in rows of which `row_length` tokens are read: each id is scored once, after what its row holds before it.

    These are the windows of EleutherAI's lm-evaluation-harness: the first row begins with `prefix_id`, each scores as
    many ids as are read, and the last one, which has fewer left to score, reads as many ids before them as fit.
    """
    whole, rows = [prefix_id, *ids], []
    for scored in range(0, len(ids), row_length):
        end = min(scored + row_length, len(ids))  # whole[end] is the last id scored
        begin = max(0, end - row_length)
        rows.append((whole[begin : end + 1], scored + 1 - begin))
    return rows


def continuation_scores(
    scorer: Scorer, tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]], add_bos: bool
) -> list[tuple[float, bool]]:
    """(log-probability of the continuation, whether greedy decoding gives it) for each (context, continuation)."""
    rows = [continuation_row(tokenizer, context, continuation, add_bos) for context, continuation in pairs]
    scores = scorer.score([row for row, _ in rows], [start for _, start in rows])
    return [(sum(score.logprobs), all(score.greedy)) for score in scores]


def passage_scores(
    scorer: Scorer, tokenizer: Tokenizer, texts: Sequence[str], row_length: int
) -> list[float]:
    """The log-probability of each whole text, its first token after the token that begins a text."""
    rows, starts, owners = [], [], []
    for owner, ids in enumerate(tokenizer.encode_batch(texts)):
        for row, start in window_rows(ids, tokenizer.bos_id, row_length):
            rows.append(row)
            starts.append(start)
            owners.append(owner)
    totals = [0.0] * len(texts)
    for owner, score in zip(owners, scorer.score(rows, starts), strict=True):
        totals[owner] += sum(score.logprobs)
    return totals
