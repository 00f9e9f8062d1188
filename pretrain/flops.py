"""Parameters, floating-point operations and the three utilizations, with every convention written out.

A multiply-add counts two, the backward pass twice the forward, hence 6 per matmul parameter and token.

mfu         6 N_mm + causal-half attention, all positions: compare with other trainers' figures.
mfu_packed  6 N_mm + attention of the pairs that documents and windows allow, non-padding tokens: what the data needed.
hfu         every matmul the program executes, recomputation included: how busy the chip is.

N_mm counts matmul parameters with the head, without the lookup, active experts only. Norms, rotary embedding,
softmax and the optimizer are left out of all three.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from pretrain.config import ConfigError
from pretrain.model.transformer import ModelConfig, Params

# Dense bfloat16 peak of one device as JAX lists devices, FLOP/s, from the vendors' data sheets (without sparsity).
# Matched by substring of device_kind, first hit wins. On v4 and 7x JAX lists what the sheet halves or doubles:
# v4 is one device a chip (megacore), 7x two devices a chip (2307 TFLOP/s together).
PEAK_FLOPS = (
    ("B200", 2250e12),
    ("H200", 989.4e12),
    ("H100 PCIe", 756e12),
    ("H100", 989.4e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("L4", 121e12),
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5", 459e12),
    ("TPU v6", 918e12),
    ("TPU7x", 1153.5e12),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParamCount:
    """Numbers of parameters."""

    total: int
    embedding: int  # the lookup table, tied or not
    head: int  # 0 when tied
    matmul: int  # takes part in a matmul for each token: blocks (active experts only) and the head, also a tied one

    @property
    def without_embedding(self) -> int:
        """Total less lookup table and head, the N of Kaplan et al."""
        return self.total - self.embedding - self.head


def params_count(params: Params) -> int:
    """Number of parameters in a tree of arrays or shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def count_params(model: ModelConfig, vocab_size: int) -> ParamCount:
    """Numbers of parameters by role, in closed form."""
    m = model
    attention = m.width * m.head_width * (2 * m.num_heads + 2 * m.num_kv_heads)
    feed_forward = active = 3 * m.width * m.hidden_width
    vectors = 0
    if m.moe is not None:
        router = m.width * m.moe.num_experts
        feed_forward, active = feed_forward * m.moe.num_experts + router, active * m.moe.num_active + router
        vectors = m.num_layers * m.moe.num_experts
    matrices = m.num_layers * (attention + feed_forward)
    vectors += m.num_layers * m.width * (4 if m.post_norms else 2) + m.width
    if m.short_conv is not None:
        vectors += m.num_layers * m.width * 2 * m.short_conv
    if m.qkv_bias:
        vectors += m.num_layers * m.head_width * (m.num_heads + 2 * m.num_kv_heads)
    if m.qk_norm:
        vectors += m.num_layers * 2 * m.head_width
    table = vocab_size * m.width
    head = 0 if m.tied_head else table
    return ParamCount(
        total=matrices + vectors + table + head,
        embedding=table,
        head=head,
        matmul=m.num_layers * (attention + active) + table,
    )


def causal_pairs(length: int, window: int | None = None) -> int:
    """Pairs (query, key) a document of `length` tokens allows: sum over t of min(t, window)."""
    reach = length if window is None else min(window, length)
    return reach * (reach + 1) // 2 + (length - reach) * reach


def flops_per_token(model: ModelConfig, vocab_size: int, row_length: int) -> float:
    """Forward and backward, causal-half convention: 6 N_mm + 6 N H T a layer (less where a window is narrower)."""
    pairs = 0.0
    for layer in range(model.num_layers):
        window = model.kind(layer).window
        reach = row_length if window is None else min(window, row_length)
        # The continuous form of causal_pairs: exactly half the square without a window.
        pairs += reach * row_length - reach * reach / 2
    attention = 12.0 * model.num_heads * model.head_width * pairs / row_length
    return 6.0 * count_params(model, vocab_size).matmul + attention


def packed_flops(model: ModelConfig, vocab_size: int, document_lengths: Iterable[int]) -> float:
    """What documents of these lengths (tokens, padding apart) need, forward and backward."""
    lengths = list(document_lengths)
    windows = [model.kind(layer).window for layer in range(model.num_layers)]
    pairs_of = {window: sum(causal_pairs(length, window) for length in lengths) for window in set(windows)}
    attention = 12.0 * model.num_heads * model.head_width * sum(pairs_of[window] for window in windows)
    return 6.0 * count_params(model, vocab_size).matmul * sum(lengths) + attention


def packed_counts(model: ModelConfig, segment_ids_BT: Any, positions_BT: Any) -> dict[str, jax.Array]:
    """What the documents of a batch need, traceable: tokens that are not padding, and attention pairs of all layers.

    Positions restart in every document, so the token at position p sees p + 1 of them, or its window.
    """
    real_BT = (segment_ids_BT > 0).astype(jnp.float32)
    pairs = jnp.zeros((), jnp.float32)
    windows = [model.kind(layer).window for layer in range(model.num_layers)]
    for window in dict.fromkeys(windows):
        seen_BT = positions_BT + 1 if window is None else jnp.minimum(positions_BT + 1, window)
        pairs += windows.count(window) * jnp.sum(seen_BT.astype(jnp.float32) * real_BT)
    return {"packed_tokens": jnp.sum(real_BT), "packed_pairs": pairs}


def flops_of_counts(model: ModelConfig, vocab_size: int, *, tokens: float, pairs: float) -> float:
    """`packed_flops` from the counts of `packed_counts`, which add up over steps."""
    return (
        6.0 * count_params(model, vocab_size).matmul * tokens
        + 12.0 * model.num_heads * model.head_width * pairs
    )


def mfu(
    model: ModelConfig, vocab_size: int, row_length: int, *, tokens_per_second: float, peak_flops: float
) -> float:
    """Model FLOPs utilization: all positions, causal half. `peak_flops` is that of all devices together."""
    return flops_per_token(model, vocab_size, row_length) * tokens_per_second / peak_flops


def hfu(step_flops: float, *, step_seconds: float, peak_flops: float) -> float:
    """Hardware FLOPs utilization from the FLOPs that a step executed."""
    return step_flops / step_seconds / peak_flops


# --- the peak ----------------------------------------------------------------------------------------


def data_sheet_flops(device_kind: str) -> float:
    """Data-sheet bfloat16 peak of one device, FLOP/s.

    Raises:
      ConfigError: a device the table does not know; use `measured_matmul_flops`.
    """
    for name, peak in PEAK_FLOPS:
        if name.lower() in device_kind.lower():
            return peak
    known = ", ".join(name for name, _ in PEAK_FLOPS)
    raise ConfigError(
        f"device kind must be one of {known}, got {device_kind!r}; use the measured matmul peak"
    )


def peak_flops() -> tuple[float, str]:
    """Peak of all devices of the run together, FLOP/s, and where the figure is from.

    Fake CPU devices share one machine, so CPUs count once.

    Raises:
      ConfigError: an accelerator the table does not know.
    """
    devices = jax.devices()
    if devices[0].platform == "cpu":
        return measured_matmul_flops(), "measured float32 matmul 1024x1024x1024, best of 5"
    kind = devices[0].device_kind
    return len(devices) * data_sheet_flops(kind), f"data sheet, bfloat16 dense, {len(devices)} x {kind}"


def measured_matmul_flops(*, size: int = 1024, dtype: str = "float32", num_repeats: int = 5) -> float:
    """Best rate of a square matmul on the default device, FLOP/s: the peak of devices without a data sheet.

    Takes about 0.2 s on two CPU cores. It varies with load, so it belongs beside every figure made with it.
    """
    x = jnp.ones((size, size), dtype)
    multiply = jax.jit(lambda a: a @ a)
    multiply(x).block_until_ready()
    best_s = math.inf
    for _ in range(num_repeats):
        start = time.perf_counter()
        multiply(x).block_until_ready()
        best_s = min(best_s, time.perf_counter() - start)
    return 2.0 * size**3 / best_s


# --- what a program executes ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Executed:
    """Matmul FLOPs of one call, all devices together.

    known: from shapes alone. per_key: in our attention kernels, which visit what the documents need, for each key
    that a query sees on average.
    """

    known: float = 0.0
    per_key: float = 0.0

    def __add__(self, other: "Executed") -> "Executed":
        return Executed(known=self.known + other.known, per_key=self.per_key + other.per_key)

    def times(self, count: float) -> "Executed":
        """Of `count` calls."""
        return Executed(known=count * self.known, per_key=count * self.per_key)

    def total(self, keys_per_query: float) -> float:
        """FLOPs where a query sees that many keys on average; what kernels mask inside of a block is not counted."""
        return self.known + self.per_key * keys_per_query


# Matmuls of queries by keys in each of our kernels: dq makes the probabilities anew, dk/dv does so too.
_KERNEL_MATMULS = {"attention_forward": 2, "attention_backward_q": 3, "attention_backward_kv": 4}


def executed_flops(function: Callable[..., Any], *arguments: Any) -> Executed:
    """Matmul FLOPs of one call, all devices together, from the jaxpr: after differentiation and remat.

    XLA's own cost analysis counts the body of a loop once; here a scan counts its length. Of kernels that are not
    ours every step of the grid counts; a `while` with an unknown number of iterations is an error, the dearest branch
    of a `cond` counts.
    """
    return executed_flops_of(jax.make_jaxpr(function)(*arguments))


def executed_flops_of(jaxpr: Any) -> Executed:
    """As `executed_flops`, of a program that is traced already."""
    return _count(jaxpr.jaxpr, 1)


def _count(jaxpr: Any, expert_parts: int) -> Executed:
    return sum((_count_equation(equation, expert_parts) for equation in jaxpr.eqns), Executed())


def _count_equation(equation: Any, expert_parts: int) -> Executed:
    """`expert_parts`: over how many devices the rows of a ragged matmul are shared out."""
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        inner = math.prod(equation.invars[0].aval.shape[i] for i in contracted)
        return Executed(known=2.0 * inner * math.prod(equation.outvars[0].aval.shape))
    if name in ("ragged_dot", "ragged_dot_general"):
        rows, inner = equation.invars[0].aval.shape[-2:]
        # Every device has room for all rows of its expert group; together they fill it once.
        return Executed(known=2.0 * rows * inner * _ragged_outputs(equation) / expert_parts)
    if name in ("pallas_call", "mpmd_map", "core_map"):
        kernel = str(params.get("name") or params.get("name_and_src_info")).split(" ")[0]
        if kernel in _KERNEL_MATMULS:
            # The first array of four dimensions or more is q: [B, T, N, H] or [B, K, G, T, H].
            queries = next(v.aval.shape for v in equation.invars if len(v.aval.shape) >= 4)
            return Executed(per_key=2.0 * _KERNEL_MATMULS[kernel] * math.prod(queries))
    if name == "cond":
        branches = [_count(branch.jaxpr, expert_parts) for branch in params["branches"]]
        return max(branches, key=lambda branch: (branch.known, branch.per_key))
    times = 1
    if name == "scan":
        times = params["length"]
    elif name == "shard_map":
        times = params["mesh"].size  # inside, shapes are those of one device; ours take all axes
        expert_parts = params["mesh"].shape["expert"]
    elif name == "pallas_call":
        grid = params["grid_mapping"].grid
        if not all(isinstance(size, int) for size in grid):
            raise NotImplementedError(
                f"the grid of the kernel {kernel} is known only when it runs; name its matmuls in flops.py"
            )
        times = math.prod(grid)
    inner_flops = sum((_count(inner, expert_parts) for inner in _inner(params)), Executed())
    if name == "while" and inner_flops != Executed():
        raise NotImplementedError("a while loop with matmuls has no known number of iterations; use scan")
    return inner_flops.times(times)


def _inner(params: dict[str, Any]) -> Iterable[Any]:
    """The jaxprs a primitive calls."""
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(item, "eqns"):
                yield item
            elif hasattr(item, "jaxpr") and hasattr(item.jaxpr, "eqns"):
                yield item.jaxpr


def _ragged_outputs(equation: Any) -> int:
    """Columns of the result: what one row and one column of the inner dim are multiplied into."""
    return equation.outvars[0].aval.shape[-1]
