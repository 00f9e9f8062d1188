"""On an accelerator: what `auto` takes there against float64, values and gradients, and the same bits again.

pytest -m device tests/pretrain/kernels/attention/test_device.py
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pretrain.kernels.attention.api import attention
from pretrain.kernels.attention.plan import AttentionSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One row of documents of `lengths`; the rest of the row is padding."""

    width: int = 128
    heads: tuple[int, int] = (4, 2)
    num_keys: int = 512
    num_queries: int | None = None  # the last of the row
    lengths: tuple[int, ...] = (512,)
    spec: AttentionSpec = AttentionSpec()
    sinks: bool = False


SHAPES = {
    "one document": Case(),
    "one head a key": Case(heads=(4, 4)),
    "four heads a key": Case(heads=(8, 2)),
    "eight heads a key": Case(heads=(8, 1)),
    "two documents": Case(lengths=(201, 311)),
    "padding": Case(lengths=(130, 70, 55)),
    "eight documents": Case(lengths=(5, 90, 3, 128, 100, 14, 72, 100)),
    "64 documents": Case(lengths=(8,) * 64),
    "window": Case(lengths=(201, 311), spec=AttentionSpec(window=100)),
    "soft cap": Case(lengths=(201, 311), spec=AttentionSpec(softcap=2.0, scale=0.3)),
    "sinks": Case(lengths=(201, 311), sinks=True),
    "all of it": Case(
        heads=(8, 2), lengths=(90, 201, 150), spec=AttentionSpec(window=77, softcap=2.0), sinks=True
    ),
    "ragged length": Case(num_keys=389, lengths=(100, 289)),
    "part of the queries": Case(num_queries=256, lengths=(201, 311)),
}
CASES = {f"{name}, width {width}": dataclasses.replace(case, width=width)
         for width in (64, 128, 256) for name, case in SHAPES.items()}  # fmt: skip

# Relative to the norm of what is right. bfloat16 has 8 bits: a product's inputs are off by 2^-9.
TOLERANCE = {"o": 4e-3, "dq": 5e-3, "dk": 5e-3, "dv": 5e-3, "dsinks": 1e-2}


def run(case, segments_of, allowed, oracle, impl, dtype):
    """Relative errors of one case, and whether a second call gave the same bits."""
    num_queries = case.num_queries or case.num_keys
    q_offset = case.num_keys - num_queries
    segments = segments_of([case.lengths], case.num_keys)
    rng = np.random.default_rng(0)

    def draw(length, heads):
        return jnp.asarray(rng.normal(size=(1, length, heads, case.width)), dtype)

    heads, kv_heads = case.heads
    q, do = draw(num_queries, heads), draw(num_queries, heads)
    k, v = draw(case.num_keys, kv_heads), draw(case.num_keys, kv_heads)
    sinks = jnp.asarray(rng.normal(size=heads), jnp.float32) if case.sinks else None

    @jax.jit
    def gradients(q, k, v, sinks, do):
        def f(q, k, v, sinks):
            return attention(
                q, k, v, segment_ids=segments, spec=case.spec, sinks_N=sinks, q_offset=q_offset, impl=impl
            )

        o, transpose = jax.vjp(f, q, k, v, sinks)
        return dict(zip(("o", "dq", "dk", "dv", "dsinks"), (o, *transpose(do)), strict=True))

    got, again = (jax.device_get(gradients(q, k, v, sinks, do)) for _ in range(2))
    mask = allowed(segments, window=case.spec.window, q_offset=q_offset, num_queries=num_queries)
    wanted = oracle(
        *(np.asarray(x, np.float64) for x in (q, k, v)), mask, scale=case.spec.scale or case.width**-0.5,
        softcap=case.spec.softcap, sinks=sinks, do=np.asarray(do, np.float64), dlse=np.zeros((1, heads, num_queries)),
    )  # fmt: skip
    names = [name for name in TOLERANCE if got[name] is not None]
    errors = {
        name: float(
            np.linalg.norm(np.asarray(got[name], np.float64) - wanted[name]) / np.linalg.norm(wanted[name])
        )
        for name in names
    }
    return errors, all(np.array_equal(got[name], again[name]) for name in names)


@pytest.mark.device
@pytest.mark.parametrize("name", CASES)
def test_what_auto_takes_here_is_right(name, segments_of, allowed, oracle):
    if jax.default_backend() == "cpu":
        pytest.skip("there is no accelerator")
    errors, same = run(CASES[name], segments_of, allowed, oracle, "auto", jnp.bfloat16)
    assert same
    assert all(error <= TOLERANCE[key] for key, error in errors.items()), errors


@pytest.mark.parametrize("name", ["all of it, width 64", "part of the queries, width 64"])
def test_the_cases_are_what_they_say(name, segments_of, allowed, oracle):
    """Without an accelerator: XLA in float32 does them far more exactly than bfloat16 could."""
    errors, same = run(CASES[name], segments_of, allowed, oracle, "xla", jnp.float32)
    assert same
    assert max(errors.values()) < 2e-6, errors
