"""The oracle of every attention test: the textbook formula and its gradients in NumPy, float64, one head at a time.

It shares nothing with the code under test: the mask comes from segment ids, not from a plan.
"""

import numpy as np
import pytest


def mask_of(segments_BS, *, causal=True, window=None, q_offset=0, num_queries=None):
    """allowed[b, t, s]: query t sits at row q_offset + t of the keys; padding (id 0) sees only itself."""
    num_keys = segments_BS.shape[1]
    num_queries = num_keys if num_queries is None else num_queries
    q_pos = (q_offset + np.arange(num_queries))[:, None]
    k_pos = np.arange(num_keys)[None]
    seen = k_pos <= q_pos if causal else np.ones_like(k_pos <= q_pos)
    if window is not None:
        seen = seen & (abs(q_pos - k_pos) < window)
    mine = segments_BS[:, q_offset : q_offset + num_queries, None]
    return seen & (mine == segments_BS[:, None]) & ((mine != 0) | (q_pos == k_pos))


def attention_in_float64(q, k, v, mask, *, scale, softcap=None, sinks=None, do=None, dlse=None):
    """{"o", "lse"}, and with cotangents also {"dq", "dk", "dv", "dsinks"}."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    heads, group = q.shape[2], q.shape[2] // k.shape[2]
    out = {"o": np.zeros(q.shape), "lse": np.zeros((q.shape[0], heads, q.shape[1]))}
    if do is not None:
        do, dlse = np.asarray(do, np.float64), np.asarray(dlse, np.float64)
        out |= {
            "dq": np.zeros(q.shape),
            "dk": np.zeros(k.shape),
            "dv": np.zeros(v.shape),
            "dsinks": np.zeros(heads),
        }
    for b in range(q.shape[0]):
        for n in range(heads):
            keys, values = k[b, :, n // group], v[b, :, n // group]
            raw = q[b, :, n] @ keys.T * scale
            s = raw if softcap is None else softcap * np.tanh(raw / softcap)
            weight = np.where(mask[b], np.exp(s), 0.0)
            sink = 0.0 if sinks is None else np.exp(np.float64(sinks[n]))
            total = weight.sum(axis=1) + sink
            p = weight / total[:, None]
            out["o"][b, :, n] = o = p @ values
            out["lse"][b, n] = np.log(total)
            if do is None:
                continue
            delta = (o * do[b, :, n]).sum(axis=1) - dlse[b, n]
            ds = p * (do[b, :, n] @ values.T - delta[:, None])
            if softcap is not None:
                ds = ds * (1 - np.tanh(raw / softcap) ** 2)
            out["dq"][b, :, n] = ds @ keys * scale
            out["dk"][b, :, n // group] += ds.T @ q[b, :, n] * scale
            out["dv"][b, :, n // group] += p.T @ do[b, :, n]
            out["dsinks"][n] -= (sink / total * delta).sum()
    return out


@pytest.fixture(scope="session")
def oracle():
    """`attention_in_float64`."""
    return attention_in_float64


@pytest.fixture(scope="session")
def allowed():
    """`mask_of`."""
    return mask_of


@pytest.fixture(scope="session")
def segments_of():
    """Rows of segment ids from rows of document lengths; what is left over is padding."""

    def build(lengths_of_rows, num_keys):
        rows = np.zeros((len(lengths_of_rows), num_keys), np.int32)
        for row, lengths in zip(rows, lengths_of_rows, strict=True):
            ids = np.repeat(np.arange(1, len(lengths) + 1), lengths)
            row[: len(ids)] = ids
        return rows

    return build


@pytest.fixture(scope="session")
def quick():
    """jit for kernels in interpret mode: compiling is nearly all they cost, so hardly optimize."""
    import jax

    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    if jax.__version_info__ < (0, 12):  # from there on there is no such choice
        options["xla_cpu_use_fusion_emitters"] = False
    return lambda f, **kwargs: jax.jit(f, compiler_options=options, **kwargs)
