"""The Hopper kernels without a GPU: their bodies run in an emulator of the machine, and they lower for cuda.

jax's own interpreter knows neither accumulators that go on nor operands in registers. The emulator below executes
the same bodies in NumPy, one thread a warpgroup: copies and products are as late as the machine allows, memory holds
NaN until it is filled and again from the moment a copy into it starts, barriers count phases. A tile that is read
too early or released too early turns the result into NaN, a barrier that is missed stops the test.
"""

import dataclasses
import itertools
import random
import threading
import time
import types

import jax
import numpy as np
import pytest
from jax.experimental import pallas as pl

from pretrain.kernels.attention import hopper
from pretrain.kernels.attention import math as tile_math
from pretrain.kernels.attention.configs import HopperBlocks, hopper_blocks
from pretrain.kernels.attention.plan import AttentionSpec, make_plan

# Only a deadlock takes this long, also on a machine that has much else to do.
TIMEOUT_S = 300


# --- the emulator ------------------------------------------------------------------------------------


class View:
    """A reference: `at` narrows, `T` transposes, indexing reads now."""

    def __init__(self, array):
        self.array = array
        self.at = _At(self)

    shape = property(lambda self: self.array.shape)
    dtype = property(lambda self: self.array.dtype)
    T = property(lambda self: View(self.array.T))

    def __getitem__(self, index):
        return np.array(self.array[_index(index)])[()]

    def __setitem__(self, index, value):
        assert value.shape == self.array.shape
        assert value.dtype == self.array.dtype
        self.array[_index(index)] = value


class _At:
    def __init__(self, view):
        self.view = view

    def __getitem__(self, index):
        if isinstance(self.view, Barrier):
            return Barrier(self.view.cells[int(index) : int(index) + 1])
        index = tuple(slice(int(i), int(i) + 1) if not isinstance(i, pl.Slice) else i for i in _tuple(index))
        kept = self.view.array[_index(index)]
        whole = tuple(0 if isinstance(i, slice) else slice(None) for i in index)
        return View(kept[whole])


def _tuple(index):
    return index if isinstance(index, tuple) else (index,)


def _index(index):
    out = []
    for i in _tuple(index):
        if isinstance(i, pl.Slice):
            out.append(slice(int(i.start), int(i.start) + i.size))
        elif i is Ellipsis or isinstance(i, slice):
            out.append(i)
        else:
            out.append(int(i))
    return tuple(out)


class Cell:
    """One barrier: a phase ends with its last arrival; a thread waits for the phases in order."""

    def __init__(self, arrivals, machine):
        self.arrivals, self.machine = arrivals, machine
        self.count, self.phase, self.arrived = 0, 0, set()
        self.waited = {}

    def arrive(self, who):
        with self.machine.lock:
            assert who not in self.arrived, "one warpgroup arrives twice in a phase"
            self.arrived.add(who)
            self.count += 1
            if self.count == self.arrivals:
                self.count, self.phase, self.arrived = 0, self.phase + 1, set()
                self.machine.lock.notify_all()

    def wait(self, who):
        with self.machine.lock:
            done = self.waited.get(who, 0)
            ended = self.machine.lock.wait_for(lambda: self.phase > done or self.machine.failed, TIMEOUT_S)
            assert ended, "a barrier is waited for in vain"
            assert not self.machine.failed
            # The machine knows the parity of a phase only: whoever is two phases late would wait for ever.
            assert self.phase == done + 1, "a phase was missed"
            self.waited[who] = done + 1


class Barrier:
    def __init__(self, cells):
        self.cells = cells
        self.at = _At(self)

    @property
    def cell(self):
        (cell,) = self.cells
        return cell


class Accumulator:
    """A sum in registers. Reading it waits for every product that was asked for."""

    def __init__(self, value, machine):
        self.value, self.machine = value, machine
        self.shape = value.shape

    def __getitem__(self, index):
        return self.machine.wgmma_accumulator_load(self)


@dataclasses.dataclass
class Memory:
    shape: tuple
    dtype: object
    transforms: tuple = ()


@dataclasses.dataclass
class Barriers:
    num_barriers: int = 1
    num_arrivals: int = 1


class ACC:
    def __init__(self, shape, dtype):
        self.value = np.zeros(shape, dtype)

    @staticmethod
    def init(value):
        out = ACC((), np.float32)
        out.value = value
        return out


class Machine:
    """Runs thread blocks one after another, the three warpgroups of each in threads of their own."""

    def __init__(self, seed=0):
        self.lock = threading.Condition()
        self.local = threading.local()
        self.random = random.Random(seed)
        self.failed = False
        self.copies = []  # (kind, array) of copies into shared memory
        self.copy_numbers = itertools.count()

    # What the kernels call.

    def kernel(
        self, body, *, out_type, scratch_types, grid, num_threads, thread_name, name, warpgroup_semantics
    ):
        def run(*operands):
            inputs = [View(np.asarray(x)) for x in operands]
            outputs = [View(_poison(t.shape, t.dtype)) for t in out_type]
            for place in itertools.product(*(range(n) for n in reversed(grid.values()))):
                axes = dict(zip(grid, reversed(place), strict=True))
                self._block(body, inputs + outputs, scratch_types, axes, num_threads, thread_name)
            return [o.array for o in outputs]

        return run

    def _block(self, body, refs, scratch_types, axes, num_threads, thread_name):
        scratch = {}
        for name, what in scratch_types.items():
            if isinstance(what, Memory):
                scratch[name] = View(_poison(what.shape, what.dtype))
            else:
                scratch[name] = Barrier([Cell(what.num_arrivals, self) for _ in range(what.num_barriers)])
        errors = []

        def warpgroup(index):
            self.local.axes = {**axes, thread_name: index}
            self.local.writes, self.local.products = [], []
            try:
                # Poison is expected: what it reaches is judged at the end.
                with np.errstate(all="ignore"):
                    body(*refs, **scratch)
                assert not self.local.writes, "a block ends before its results are written"
                assert not self.local.products, "a block ends before its products are waited for"
            except BaseException as error:
                errors.append(error)
                with self.lock:
                    self.failed = True
                    self.lock.notify_all()

        threads = [threading.Thread(target=warpgroup, args=(i,)) for i in range(num_threads)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]

    def axis_index(self, name):
        return np.int32(self.local.axes[name])

    def copy_gmem_to_smem(self, source, target, barrier):
        assert source.shape == target.shape
        assert source.dtype == target.dtype
        target.array[...] = _poison(target.shape, target.dtype)
        delay_s = self.random.random() * 1e-3
        number = next(self.copy_numbers)

        def arrive():
            time.sleep(delay_s)
            target.array[...] = source.array
            barrier.cell.arrive(("copy", number))

        threading.Thread(target=arrive).start()

    def copy_smem_to_gmem(self, source, target):
        assert source.shape == target.shape
        self.local.writes.append((source, target))

    def wait_smem_to_gmem(self, n):
        assert n == 0
        for source, target in self.local.writes:
            target.array[...] = source.array
        self.local.writes = []

    def wgmma(self, acc, a, b):
        self.local.products.append((acc, a, b))

    def wgmma_wait(self, n):
        """Products are added in order and no sooner than somebody waits for them."""
        while len(self.local.products) > n:
            acc, *factors = self.local.products.pop(0)
            a, b = (x[...] if isinstance(x, View) else x for x in factors)
            acc.value = acc.value + a @ b

    def wgmma_accumulator_load(self, acc, wait_n=0):
        self.wgmma_wait(wait_n)
        assert all(acc is not other for other, *_ in self.local.products), (
            "a sum is read before it is complete"
        )
        return acc.value

    def barrier_arrive(self, barrier):
        time.sleep(self.random.random() * 1e-4)
        barrier.cell.arrive(self.local.axes["warpgroup"])

    def barrier_wait(self, barrier):
        barrier.cell.wait(self.local.axes["warpgroup"])

    def install(self, monkeypatch):
        def when(condition):
            return lambda f: f() if bool(condition) else None

        def run_scoped(f, *accs):
            return f(*(Accumulator(acc.value, self) for acc in accs))

        def run_state(f):
            def run(accs):
                accumulators = tuple(Accumulator(acc.value, self) for acc in accs)
                f(accumulators)
                return tuple(accumulator[...] for accumulator in accumulators)

            return run

        def fori_loop(start, stop, body, carry):
            for i in range(int(start), int(stop)):
                carry = body(np.int32(i), carry)
            return carry

        layout = types.SimpleNamespace(WGMMA=types.SimpleNamespace(reduce=lambda axis: axis))
        plgpu = types.SimpleNamespace(
            Layout=layout,
            SMEM=Memory,
            Barrier=Barriers,
            ACC=ACC,
            TilingTransform=lambda shape: shape,
            SwizzleTransform=lambda width: width,
            layout_cast=lambda x, layout: x,
            broadcasted_iota=lambda dtype, shape, dim, layout: np.indices(shape, dtype)[dim],
            set_max_registers=lambda number, action: None,
            commit_smem=lambda: None,
            wgmma=self.wgmma,
            wgmma_wait=self.wgmma_wait,
            wgmma_accumulator_load=self.wgmma_accumulator_load,
            copy_gmem_to_smem=self.copy_gmem_to_smem,
            copy_smem_to_gmem=self.copy_smem_to_gmem,
            wait_smem_to_gmem=self.wait_smem_to_gmem,
            barrier_arrive=self.barrier_arrive,
            barrier_wait=self.barrier_wait,
        )
        fake_lax = types.SimpleNamespace(
            axis_index=self.axis_index,
            fori_loop=fori_loop,
            cond=lambda condition, yes, no, *x: yes(*x) if bool(condition) else no(*x),
            optimization_barrier=lambda x: x,
            rem=np.remainder,
            div=np.floor_divide,
            broadcast_in_dim=lambda x, shape, dims: np.broadcast_to(
                x[:, None] if dims == [0] else x[None], shape
            ),
        )
        fake_pl = types.SimpleNamespace(when=when, ds=pl.ds, run_scoped=run_scoped, run_state=run_state)
        monkeypatch.setattr(hopper, "jnp", np)
        monkeypatch.setattr(tile_math, "jnp", np)
        monkeypatch.setattr(hopper, "plgpu", plgpu)
        monkeypatch.setattr(hopper, "lax", fake_lax)
        monkeypatch.setattr(hopper, "pl", fake_pl)
        monkeypatch.setattr(hopper.compat, "mgpu_kernel", self.kernel)
        monkeypatch.setattr(hopper.compat, "mgpu_load", lambda ref, layout: ref[...])


def _poison(shape, dtype):
    dtype = np.dtype(dtype)
    return np.full(shape, np.iinfo(dtype).min if dtype.kind == "i" else np.nan, dtype)


# --- values and gradients ----------------------------------------------------------------------------


def blocks_of(block_q=64, block_k=64, stages=2):
    return HopperBlocks(
        block_q=block_q, block_k=block_k, stages=stages, block_q_dq=block_q, block_k_dq=block_k, block_q_dkv=block_q,
        block_k_dkv=block_k, stages_bwd=stages,
    )  # fmt: skip


def run(monkeypatch, q, k, v, do, dlse, sinks, segments, spec, blocks, q_offset=0, seed=0):
    """Outputs and gradients by name, computed by the bodies of the kernels."""
    plan = make_plan(segments, spec, seq_len=k.shape[1]).rows(q_offset, q.shape[1])
    ranges = hopper.tile_ranges(plan, blocks, q_offset)
    Machine(seed).install(monkeypatch)
    with monkeypatch.context() as patch:
        # The derivative rule is called by hand: the emulator needs values, not tracers.
        saved = []

        def forward(static, *arguments):
            out, residuals = jax.tree.map(np.asarray, hopper._attention_fwd(static, *arguments))
            saved.append((static, residuals))
            return out

        patch.setattr(hopper, "_attention", forward)
        o, lse = hopper.hopper_attention(q, k, v, plan.k_lo_BT, ranges, sinks, spec, q_offset=q_offset)
    static, residuals = saved[0]
    dq, dk, dv, dsinks, *_ = hopper._attention_bwd(static, residuals, (do, dlse * hopper.LN2))
    return {"o": o, "lse": lse, "dq": dq, "dk": dk, "dv": dv, "dsinks": dsinks}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    rows: tuple = ((256,),)
    num_keys: int = 256
    num_queries: int = 256
    q_offset: int = 0
    heads: tuple[int, int] = (1, 1)
    width: int = 64
    spec: AttentionSpec = AttentionSpec()
    sinks: bool = False
    stages: int = 2


CASES = {
    "causal": Case(),
    "packed": Case(rows=((70, 100, 30, 56), (256,)), stages=3),
    "group_sinks_softcap": Case(
        rows=((129, 100),), heads=(2, 1), sinks=True, spec=AttentionSpec(softcap=2.0, window=90)
    ),
    "context_shard": Case(num_queries=128, q_offset=128, rows=((100, 156),)),
    "wide": Case(width=256, num_keys=128, num_queries=128, rows=((60, 68),), heads=(2, 1)),
}


@pytest.mark.parametrize("name", CASES)
def test_bodies_compute_attention_and_its_gradients(name, monkeypatch, oracle, allowed, segments_of):
    case = CASES[name]
    rng = np.random.default_rng(3)

    def draw(*shape):
        return rng.normal(size=shape).astype(np.float32)

    batch, (heads, kv_heads) = len(case.rows), case.heads
    q, do = (draw(batch, case.num_queries, heads, case.width) for _ in range(2))
    k, v = (draw(batch, case.num_keys, kv_heads, case.width) for _ in range(2))
    dlse, sinks = draw(batch, heads, case.num_queries), draw(heads) if case.sinks else None
    segments = segments_of(case.rows, case.num_keys)
    got = run(
        monkeypatch,
        q,
        k,
        v,
        do,
        dlse,
        sinks,
        segments,
        case.spec,
        blocks_of(stages=case.stages) if case.width < 256 else hopper_blocks(256, packed=True),
        case.q_offset,
    )
    mask = allowed(segments, window=case.spec.window, q_offset=case.q_offset, num_queries=case.num_queries)
    wanted = oracle(
        q, k, v, mask, scale=case.width**-0.5, softcap=case.spec.softcap, sinks=sinks, do=do, dlse=dlse
    )
    for key in ("o", "lse", "dq", "dk", "dv") + ("dsinks",) * case.sinks:
        error = np.linalg.norm(got[key] - wanted[key]) / np.linalg.norm(wanted[key])
        assert error <= 2e-5, (key, error)


def test_a_sink_of_minus_infinity_is_no_sink(monkeypatch, segments_of):
    """Also where a soft cap makes masked scores -inf, and rows begin with tiles that are masked for them."""
    rng = np.random.default_rng(3)
    q, do = (rng.normal(size=(1, 128, 1, 64)).astype(np.float32) for _ in range(2))
    segments, spec = segments_of(((10, 110),), 128), AttentionSpec(softcap=2.0, window=30)
    without, with_sinks = (
        run(monkeypatch, q, q, q, do, np.zeros((1, 1, 128), np.float32), sinks, segments, spec, blocks_of())
        for sinks in (None, np.full(1, -np.inf, np.float32))
    )
    for key in ("o", "lse", "dq", "dk", "dv"):
        np.testing.assert_array_equal(with_sinks[key], without[key], err_msg=key)
    np.testing.assert_array_equal(with_sinks["dsinks"], 0)


def test_tiles_of_other_documents_are_never_copied(monkeypatch, segments_of):
    """NaN in one document does not reach the other when they share no tile."""
    rng = np.random.default_rng(3)
    q, do = (rng.normal(size=(1, 512, 1, 64)).astype(np.float32) for _ in range(2))
    for x in (q, do):
        x[:, :256] = np.nan
    segments = segments_of(((256, 256),), 512)
    got = run(monkeypatch, q, q, q, do, np.zeros((1, 1, 512), np.float32), None, segments,
              AttentionSpec(), blocks_of())  # fmt: skip
    for key in ("o", "dq", "dk", "dv"):
        assert np.isnan(got[key][:, :256]).any(), key
        assert np.isfinite(got[key][:, 256:]).all(), key
