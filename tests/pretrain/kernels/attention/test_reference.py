"""The XLA path: values and gradients against float64, dense and in blocks of queries."""

import jax
import numpy as np
import pytest

from pretrain.kernels.attention import reference
from pretrain.kernels.attention.plan import AttentionSpec, allowed_BTS, make_plan

LENGTH = 24
ROWS = ((24,), (7, 9), (1,) * 24)


def inputs():
    rng = np.random.default_rng(0)

    def draw(*shape):
        return rng.normal(size=shape).astype(np.float32)

    batch = len(ROWS)
    return (
        *(draw(batch, LENGTH, heads, 8) for heads in (4, 2, 2, 4)), draw(batch, 4, LENGTH), draw(4),
    )  # fmt: skip


@pytest.mark.parametrize("chunk", [None, 8, 1])
@pytest.mark.parametrize(
    "spec",
    [AttentionSpec(), AttentionSpec(window=5, softcap=2.0, scale=0.5), AttentionSpec(causal=False, window=9)],
)
@pytest.mark.parametrize("with_sinks", [False, True])
def test_xla_equals_float64(chunk, spec, with_sinks, quick, oracle, allowed, segments_of):
    if chunk == 1 and with_sinks:
        pytest.skip("more blocks than are unrolled, once is enough")
    q, k, v, do, dlse, sinks = inputs()
    sinks = sinks if with_sinks else None
    segments = segments_of(ROWS, LENGTH)
    plan = make_plan(segments, spec, seq_len=LENGTH)

    @quick
    def run(q, k, v, sinks):
        def f(q, k, v, sinks):
            return reference.xla_attention(q, k, v, plan, sinks, spec, chunk=chunk)

        out, transpose = jax.vjp(f, q, k, v, sinks)
        return (*out, *transpose((do, dlse)))

    names = ("o", "lse", "dq", "dk", "dv", "dsinks")
    got = dict(zip(names, run(q, k, v, sinks), strict=True))
    mask = allowed(segments, causal=spec.causal, window=spec.window)
    wanted = oracle(
        q, k, v, mask, scale=spec.scale or 8**-0.5, softcap=spec.softcap, sinks=sinks, do=do, dlse=dlse
    )
    for name in names[: 6 if with_sinks else 5]:
        np.testing.assert_allclose(got[name], wanted[name], rtol=2e-5, atol=2e-5, err_msg=name)


def test_the_definition_in_float64_is_the_oracle(quick, oracle, allowed, segments_of):
    """Values by formula, gradients by differentiation: they agree with gradients derived by hand."""
    q, k, v, do, dlse, sinks = inputs()
    spec = AttentionSpec(window=6, softcap=1.5)
    segments = segments_of(ROWS, LENGTH)
    plan = make_plan(segments, spec, seq_len=LENGTH)
    with jax.enable_x64(True):
        mask = allowed_BTS(plan, 0, LENGTH)

        @quick
        def run(do, dlse, *x):
            def f(*x):
                return reference.definition(*x[:3], mask, x[3], spec, dtype=np.float64)

            out, transpose = jax.vjp(f, *x)
            return (*out, *transpose((do, dlse)))

        got = run(*(np.asarray(a, np.float64) for a in (do, dlse, q, k, v, sinks)))
    wanted = oracle(
        q, k, v, allowed(segments, window=6), scale=8**-0.5, softcap=1.5, sinks=sinks, do=do, dlse=dlse
    )
    for name, value in zip(("o", "lse", "dq", "dk", "dv", "dsinks"), got, strict=True):
        np.testing.assert_allclose(value, wanted[name], rtol=1e-11, atol=1e-11, err_msg=name)
