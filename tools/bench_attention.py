"""Our attention beside cuDNN, tokamax and XLA on this machine: correctness first, then one table, JSON and pictures.

    python -m tools.bench_attention out=attention_h100              under 8 minutes on one H100
    python -m tools.bench_attention size=smoke out=attention_cpu    seconds on a CPU: the harness, not the chip
    python -m tools.bench_attention measure=plan size=smoke         what the plan of a batch costs beside a step

Every implementation is first held to a float64 reference on fresh random inputs, in memory that held NaN before; one
that is wrong, does not compile or fails is named with the reason and not timed. All programs are compiled beforehand, side by side. Then, for every case, the
implementations take turns; a sample is the time of as many calls in a row as fill `min_sample_s`, over several sets of
inputs larger than the cache. Reported are the median and quartiles, useful TFLOP/s (allowed pairs), visited TFLOP/s
(blocks entered) and the share of a matrix-product peak that is measured in the same run, before and after; more than
3 % between the two marks the run as throttled.

Times are of the host's clock around calls that queue up, not of a profiler. What an implementation makes of a plan is
made once a batch and timed apart. cuDNN and tokamax know no packed rows, so packed rows are compared with what cuDNN
takes for plain causal ones.
"""

import dataclasses
import importlib
import importlib.metadata
import importlib.util
import itertools
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pretrain import plots
from pretrain.config import ConfigError, apply_overrides
from pretrain.data.batch import Batch
from pretrain.kernels.attention import reference
from pretrain.kernels.attention.api import IMPLEMENTATIONS, attention, choose, prepare_plan, problem_of
from pretrain.kernels.attention.plan import AttentionSpec, PackPlan, allowed_BTS, make_plan, visited_blocks
from pretrain.loss import LossConfig
from pretrain.model.transformer import ModelConfig, abstract_params
from pretrain.optim import AdamWConfig, OptimConfig, WarmupCosine, make_optimizer
from pretrain.rundir import write_atomic, write_json_atomic
from pretrain.sharding import MeshConfig, make_mesh
from pretrain.step import init_state, language_model_loss, make_train_step

DIRECTIONS = ("fwd", "bwd")
MEASURES = ("kernels", "plan")
PACKINGS = ("causal", "packed")
# TFLOP/s to ship at and to aim at on an H100: {(direction, width, length, packing): (ship, aim)}.
TARGETS = {
    ("fwd", 128, 4096, "causal"): (480, 570),
    ("fwd", 128, 16384, "causal"): (540, 640),
    ("bwd", 128, 4096, "causal"): (380, 480),
    ("bwd", 128, 16384, "causal"): (430, 540),
    ("bwd", 64, 4096, "causal"): (270, 380),
    ("bwd", 256, 4096, "causal"): (200, 350),
}
# Relative norm of the error that bfloat16 inputs and probabilities allow.
TOLERANCE = {
    "bfloat16": {"o": 5e-3, "dq": 1e-2, "dk": 1e-2, "dv": 1e-2},
    "float32": dict.fromkeys(("o", "dq", "dk", "dv"), 5e-5),
}
VOCAB = 1024  # of the model whose step the plan is set beside
OURS = ("pallas_hopper", "pallas_tpu", "tpu_interpret")
# What an implementation that cannot run here raises; tokamax groups the reasons of all that it tried.
FAILURES = (ValueError, TypeError, RuntimeError, ImportError, ExceptionGroup)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """What is measured: rows of `lengths` that together have `tokens`, and `columns` = heads · width."""

    tokens: int
    columns: int
    widths: tuple[int, ...]
    lengths: tuple[int, ...]
    heads_per_kv_head: int
    dtype: str
    median_document: int
    implementations: tuple[str, ...]
    dense_limit: int  # XLA materializes its scores: longer rows are not tried
    check_length: int
    # The training step that the plan is set beside: (layers, hidden width) over `columns` and the first of the widths,
    # (rows, tokens a row).
    step_model: tuple[int, int]
    step_rows: tuple[int, int]


SIZES = {
    # In order of interest: what does not fit in the time is left out from the end.
    "h100": Size(
        tokens=16384, columns=2048, widths=(128, 64, 256), lengths=(4096, 16384, 8192), heads_per_kv_head=1,
        dtype="bfloat16", median_document=400, implementations=("pallas_hopper", "cudnn", "tokamax", "xla"),
        dense_limit=4096, check_length=1024, step_model=(4, 8192), step_rows=(4, 4096),
    ),
    "tpu": Size(
        tokens=16384, columns=2048, widths=(128, 64, 256), lengths=(4096, 16384, 8192), heads_per_kv_head=1,
        dtype="bfloat16", median_document=400, implementations=("pallas_tpu", "tokamax", "xla"), dense_limit=4096,
        check_length=1024, step_model=(4, 8192), step_rows=(4, 4096),
    ),
    "smoke": Size(
        tokens=256, columns=64, widths=(32,), lengths=(128,), heads_per_kv_head=2, dtype="float32", median_document=20,
        implementations=("tpu_interpret", "cudnn", "tokamax", "xla"), dense_limit=128, check_length=64,
        step_model=(4, 256), step_rows=(4, 512),
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line may say, `key=value`."""

    out: str = "attention_bench"  # folder of the JSON and the pictures
    measure: str = "kernels"  # or "plan": what the plan of a batch costs beside a training step
    size: str = "h100"
    samples: int = 20
    warmup: int = 5
    min_sample_s: float = 0.02
    input_sets: int = 3
    max_seconds: float = 430.0

    def __post_init__(self):
        faults = [] if self.size in SIZES else [f"size must be one of {', '.join(SIZES)}, got {self.size!r}"]
        if self.measure not in MEASURES:
            faults.append(f"measure must be one of {', '.join(MEASURES)}, got {self.measure!r}")
        faults += [
            f"{name} must be positive, got {getattr(self, name)}"
            for name in ("samples", "warmup", "min_sample_s", "input_sets", "max_seconds")
            if not getattr(self, name) > 0
        ]
        if faults:
            raise ConfigError(*faults)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    direction: str
    width: int
    length: int
    packing: str  # "causal": one document a row; "packed": log-normal documents


# --- implementations ----------------------------------------------------------------------------------

Attention = Callable[[jax.Array, jax.Array, jax.Array, PackPlan | None], jax.Array]
Shapes = Sequence[jax.ShapeDtypeStruct]


@dataclasses.dataclass(frozen=True)
class Entrant:
    """f(q, k, v, plan) -> o, and what it wants made of a plan once a batch."""

    attend: Attention
    prepare: Callable[[PackPlan, Shapes], PackPlan] = lambda plan, shapes: plan

    def __call__(self, q: jax.Array, k: jax.Array, v: jax.Array, plan: PackPlan | None) -> jax.Array:
        return self.attend(q, k, v, plan)


def knows(name: str, packing: str) -> bool:
    """Peers know no packed rows."""
    return packing == "causal" or name in (*OURS, "xla")


def implementation(name: str, shapes: Shapes, config: Any = None) -> Entrant | str:
    """What `name` stands for, or why this machine cannot run it."""
    spec = AttentionSpec()
    if name == "tokamax":
        if importlib.util.find_spec("tokamax") is None:
            return "not installed"
        try:
            tokamax = importlib.import_module("tokamax")
        except FAILURES as error:
            return f"does not import: {one_line(error)}"
        return Entrant(lambda q, k, v, plan: tokamax.dot_product_attention(q, k, v, is_causal=True))
    if name not in IMPLEMENTATIONS:
        return "unknown"
    q, k = shapes[:2]
    try:
        choose(problem_of(q, k, spec, packed=False), name, config)
    except NotImplementedError as error:
        return str(error)
    if name in (*OURS, "xla"):
        return Entrant(
            lambda q, k, v, plan: attention(q, k, v, plan=plan, spec=spec, impl=name, config=config),
            lambda plan, shapes: prepare_plan(plan, *shapes[:2], spec=spec, impl=name, config=config),
        )
    return Entrant(lambda q, k, v, plan: attention(q, k, v, spec=spec, impl=name))


def forward_and_backward(f: Attention) -> dict[str, Any]:
    """{"fwd": (q, k, v, plan) -> o, "saved": the same -> what the backward needs, "bwd": (saved, do) -> gradients}."""

    def forward(q, k, v, plan):
        return f(q, k, v, plan)

    def saved(q, k, v, plan):
        return jax.vjp(lambda q, k, v: f(q, k, v, plan), q, k, v)

    return {
        "fwd": jax.jit(forward),
        "saved": jax.jit(saved),
        "bwd": jax.jit(lambda transpose, do: transpose(do)),
    }


Compiled = dict[str, Callable[..., Any]]
Job = tuple[Attention | Entrant, Shapes, PackPlan]
PARTS = ("fwd", "saved", "bwd")


def prepared(job: Job) -> PackPlan:
    """The plan with what the implementation makes of it once a batch."""
    attend, shapes, plan = job
    return attend.prepare(plan, shapes) if isinstance(attend, Entrant) else plan


def compile_job(job: Job, parts: Sequence[str] = PARTS) -> Compiled:
    """The programs of one implementation for inputs of these shapes; `saved` and `bwd` are a forward and backward."""
    attend, (q, k, v, do), _ = job
    plan = prepared(job)
    functions = forward_and_backward(attend)
    transpose = jax.eval_shape(functions["saved"], q, k, v, plan)[1]
    arguments = {"fwd": (q, k, v, plan), "saved": (q, k, v, plan), "bwd": (transpose, do)}
    return {part: functions[part].lower(*arguments[part]).compile() for part in parts}


def compiled(jobs: Mapping[Any, Job], parts: Sequence[str] = PARTS) -> dict[Any, Compiled | str]:
    """The programs of every job, compiled side by side; of one that does not compile, the reason in a line."""
    out: dict[Any, Compiled | str] = {}
    with ThreadPoolExecutor() as pool:
        futures = {key: pool.submit(compile_job, job, parts) for key, job in jobs.items()}
        for key, future in futures.items():
            try:
                out[key] = future.result()
            except FAILURES as error:
                out[key] = f"does not compile: {one_line(error)}"
    return out


def one_line(error: BaseException) -> str:
    """The kind of an error and the first line of what it says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200] if lines else 'without a word'}"


# --- inputs ------------------------------------------------------------------------------------------


def shapes_of(size: Size, width: int, length: int, rows: int) -> Shapes:
    heads = size.columns // width
    q = jax.ShapeDtypeStruct((rows, length, heads, width), jnp.dtype(size.dtype))
    k = jax.ShapeDtypeStruct((rows, length, heads // size.heads_per_kv_head, width), q.dtype)
    return q, k, k, q


def draw(shapes: Shapes, seed: int) -> tuple[jax.Array, ...]:
    """Standard normal: kinder data lets the chip run at a higher clock."""
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return tuple(jax.random.normal(key, s.shape, s.dtype) for key, s in zip(keys, shapes, strict=True))


def segments(rows: int, length: int, median: int, seed: int) -> np.ndarray:
    """Log-normal documents laid end to end and cut at the rows' ends."""
    rng = np.random.default_rng(seed)
    out = np.zeros((rows, length), np.int32)
    for row in out:
        start = 0
        for i in itertools.count(1):
            stop = start + max(1, int(np.exp(rng.normal(np.log(median), 1.0))))
            row[start:stop] = i
            start = stop
            if start >= length:
                break
    return out


def plan_of(size: Size, case: Case, rows: int, seed: int = 0) -> PackPlan:
    if case.packing == "causal":
        return make_plan(None, AttentionSpec(), seq_len=case.length, batch=rows)
    ids = segments(rows, case.length, size.median_document, seed)
    return make_plan(ids, AttentionSpec(), seq_len=case.length)


def useful_flops(plan: PackPlan, case: Case, heads: int) -> float:
    """Of the allowed pairs: two products forward, five backward."""
    k_lo = np.asarray(plan.k_lo_BT)
    pairs = float((np.arange(case.length) - k_lo + 1).sum())
    return (4 if case.direction == "fwd" else 10) * heads * case.width * pairs


# --- correctness -------------------------------------------------------------------------------------


def poison(like: Any) -> None:
    """Leave NaN in the memory that results of these shapes will be given: what is not written shows."""
    arrays = [jnp.full(x.shape, jnp.nan, x.dtype) for x in jax.tree.leaves(like) for _ in range(2)]
    jax.block_until_ready(arrays)
    for x in arrays:
        x.delete()


def check_job(f: Attention | Entrant, size: Size, width: int, packing: str, seed: int) -> Job:
    """The small problem that `f` is held to: one row, two heads on a key-value head."""
    case = Case(direction="fwd", width=width, length=size.check_length, packing=packing)
    small = dataclasses.replace(size, columns=4 * width, heads_per_kv_head=2)
    return f, shapes_of(small, width, size.check_length, rows=1), plan_of(small, case, rows=1, seed=seed)


def errors_against_float64(
    f: Attention | Entrant, size: Size, width: int, packing: str, seed: int, programs: Compiled | None = None
) -> dict[str, float]:
    """Relative norms of what is wrong with outputs and gradients; NaN where something was not computed.

    programs: those of `check_job`, where they are compiled already. No other thread may use the device meanwhile: it
    would be given the poisoned memory.
    """
    job = check_job(f, size, width, packing, seed)
    if programs is None:
        programs = compile_job(job, ("saved", "bwd"))
    _, shapes, plan = job
    own = prepared(job)
    q, k, v, do = jax.block_until_ready(draw(shapes, seed))
    # Compiling, and trying algorithms in doing so, takes memory: what is poisoned before it is no longer what results
    # are written to.
    poison(jax.eval_shape(lambda *x: jax.vjp(lambda q, k, v: f(q, k, v, own), *x), q, k, v))
    o, transpose = jax.block_until_ready(programs["saved"](q, k, v, own))
    poison((q, k, v))
    gradients = jax.block_until_ready(programs["bwd"](transpose, do))
    got = {"o": o} | dict(zip(("dq", "dk", "dv"), gradients, strict=True))
    with jax.default_device(jax.devices("cpu")[0]), jax.enable_x64(True):

        def exact(x):
            return jnp.asarray(np.asarray(x, np.float64))

        ranges = PackPlan(*(jnp.asarray(np.asarray(x)) for x in (plan.k_lo_BT, plan.q_hi_BS)))
        mask = allowed_BTS(ranges, 0, size.check_length)

        def define(q, k, v):
            return reference.definition(q, k, v, mask, None, AttentionSpec(), dtype=jnp.float64)[0]

        o, transpose = jax.vjp(define, exact(q), exact(k), exact(v))
        wanted = {"o": o} | dict(zip(("dq", "dk", "dv"), transpose(exact(do)), strict=True))
        wanted = {name: np.asarray(x) for name, x in wanted.items()}
    return {
        name: float(
            np.linalg.norm(np.asarray(got[name], np.float64) - wanted[name]) / np.linalg.norm(wanted[name])
        )
        for name in wanted
    }


# --- timing ------------------------------------------------------------------------------------------


def seconds_a_call(run: Callable[..., Any], inputs: Sequence[tuple[Any, ...]], calls: int) -> float:
    """The mean over `calls` that queue up behind one another, inputs in rotation."""
    start = time.perf_counter()
    for arguments in itertools.islice(itertools.cycle(inputs), calls):
        out = run(*arguments)
    jax.block_until_ready(out)
    return (time.perf_counter() - start) / calls


def interleaved(
    runs: Mapping[str, tuple[Callable[..., Any], Sequence[tuple[Any, ...]]]], options: Options
) -> dict[str, list[float]]:
    """Samples of seconds a call for each entrant, taken in turn."""
    calls = {}
    for name, (run, inputs) in runs.items():
        seconds_a_call(run, inputs, options.warmup)
        calls[name] = max(1, round(options.min_sample_s / seconds_a_call(run, inputs, 2)))
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(options.samples):
        for name in list(runs) if turn % 2 == 0 else list(runs)[::-1]:
            samples[name].append(seconds_a_call(*runs[name], calls[name]))
    return samples


def matmul_peak(size: Size, options: Options) -> float:
    """TFLOP/s of a plain product of random normal matrices."""
    n = 8192 if size.dtype == "bfloat16" else 256
    a, b = draw([jax.ShapeDtypeStruct((n, n), jnp.dtype(size.dtype))] * 2, 1)
    multiply = jax.jit(lambda a, b: a @ b)
    samples = interleaved({"matmul": (multiply, [(a, b), (b, a)])}, options)["matmul"]
    return 2 * n**3 / statistics.median(samples) / 1e12


def copy_bandwidth(size: Size, options: Options) -> float:
    """GB/s read plus written."""
    n = (1 << 28) if size.dtype == "bfloat16" else (1 << 20)
    x = jnp.ones((n,), jnp.bfloat16)
    samples = interleaved({"copy": (jax.jit(lambda x: -x), [(x,)])}, options)["copy"]
    return 4 * n / statistics.median(samples) / 1e9


# --- the run -----------------------------------------------------------------------------------------


def problems_of(size: Size) -> Iterator[tuple[int, int]]:
    """(length, width): every width at the first length before the next length."""
    yield from itertools.product(size.lengths, size.widths)


def cases_of(length: int, width: int) -> Iterator[Case]:
    """Causal and packed, forward and backward."""
    for packing, direction in itertools.product(PACKINGS, DIRECTIONS):
        yield Case(direction=direction, width=width, length=length, packing=packing)


def rows_of(size: Size, length: int) -> int:
    return max(1, size.tokens // length)


def run_case(
    size: Size,
    case: Case,
    entrants: Mapping[str, tuple[Entrant, Compiled]],
    peak: float,
    options: Options,
) -> list[dict]:
    """A row of the report for each entrant."""
    rows = rows_of(size, case.length)
    heads = size.columns // case.width
    plan = plan_of(size, case, rows)
    shapes = shapes_of(size, case.width, case.length, rows)
    sets = [draw(shapes, seed) for seed in range(options.input_sets)]
    runs = {}
    for name, (entrant, functions) in entrants.items():
        own = entrant.prepare(plan, shapes)
        if case.direction == "fwd":
            runs[name] = functions["fwd"], [(q, k, v, own) for q, k, v, _ in sets]
        else:
            saved = [functions["saved"](q, k, v, own)[1] for q, k, v, _ in sets]
            runs[name] = functions["bwd"], [(s, do) for s, (*_, do) in zip(saved, sets, strict=True)]
    flops = useful_flops(plan, case, heads)
    blocks = visited_blocks(plan, block_q=128, block_k=128) if case.length % 128 == 0 else None
    out = []
    for name, samples in interleaved(runs, options).items():
        median = statistics.median(samples)
        quartiles = statistics.quantiles(samples, n=4) if len(samples) > 1 else [median] * 3
        row = {
            **dataclasses.asdict(case), "impl": name, "rows": rows, "heads": heads,
            "kv_heads": heads // size.heads_per_kv_head, "median_ms": 1e3 * median,
            "quartiles_ms": [1e3 * quartiles[0], 1e3 * quartiles[2]], "samples": len(samples),
            "tflops": flops / median / 1e12, "share_of_peak": flops / median / 1e12 / peak,
        }  # fmt: skip
        if name in OURS and blocks is not None:
            visited = (
                float(blocks.sum()) * 128 * 128 * heads * case.width * (4 if case.direction == "fwd" else 10)
            )
            row["visited_tflops_at_128"] = visited / median / 1e12
        if name in OURS and (target := TARGETS.get((case.direction, case.width, case.length, case.packing))):
            row["ship"], row["aim"] = target
        out.append(row)
    return out


def compare_with_cudnn(table: Sequence[dict]) -> None:
    """Writes into every row how many times as fast it is as plain causal cuDNN of the same shape."""
    of_cudnn = {
        (r["direction"], r["width"], r["length"]): r["median_ms"] for r in table if r["impl"] == "cudnn"
    }
    for row in table:
        theirs = of_cudnn.get((row["direction"], row["width"], row["length"]))
        if theirs is not None:
            row["speed_over_cudnn"] = theirs / row["median_ms"]


def admit(size: Size, seed: int) -> tuple[dict[int, dict[str, Entrant]], list[dict]]:
    """The implementations that are right, by width, and a row on every one: its errors, or in a line why it is absent."""
    found: dict[tuple[int, str], Entrant | str] = {
        (width, name): implementation(name, shapes_of(size, width, size.lengths[0], rows=1))
        for width, name in itertools.product(size.widths, size.implementations)
    }
    jobs = {
        (width, name, packing): check_job(f, size, width, packing, seed)
        for (width, name), f in found.items()
        for packing in PACKINGS
        if not isinstance(f, str) and knows(name, packing)
    }
    programs = compiled(jobs, ("saved", "bwd"))
    admitted: dict[int, dict[str, Entrant]] = {width: {} for width in size.widths}
    rows = []
    for (width, name), f in found.items():
        row: dict[str, Any] = {"impl": name, "width": width}
        rows.append(row)
        if isinstance(f, str):
            row["absent"] = f
            continue
        mine = {packing: programs[width, name, packing] for packing in PACKINGS if knows(name, packing)}
        reasons = [p for p in mine.values() if isinstance(p, str)]
        if reasons:
            row["absent"] = reasons[0]
            continue
        try:
            # One after another: see errors_against_float64.
            errors = {
                packing: errors_against_float64(f, size, width, packing, seed, compiled)
                for packing, compiled in mine.items()
            }
        except FAILURES as error:
            row["absent"] = f"fails: {one_line(error)}"
            continue
        # `not <=` and not `>`: NaN is wrong.
        wrong = [
            f"{packing} {key}"
            for packing, of in errors.items()
            for key, error in of.items()
            if not error <= TOLERANCE[size.dtype][key]
        ]
        # JSON has no NaN.
        row["errors"] = {
            packing: {key: error if error == error else None for key, error in of.items()}
            for packing, of in errors.items()
        }
        row["wrong"] = wrong
        if not wrong:
            admitted[width][name] = f
    return admitted, rows


def plan_ms(size: Size, entrant: Entrant, width: int, options: Options) -> float:
    """What the plan of a batch costs with all that is made of it, on ids that are already on the device."""
    length = max(size.lengths)
    rows = rows_of(size, length)
    shapes = shapes_of(size, width, length, rows)
    ids = jnp.asarray(segments(rows, length, size.median_document, 0))
    make = jax.jit(lambda ids: entrant.prepare(make_plan(ids, AttentionSpec(), seq_len=length), shapes))
    return 1e3 * statistics.median(interleaved({"plan": (make, [(ids,)])}, options)["plan"])


def plan_beside_a_step(options: Options) -> dict[str, Any]:
    """Milliseconds of a training step of a small model on packed rows, of the plan of its batch, and their ratios.

    The step attends by XLA: what runs on every machine. "plan" is what every implementation is given, "prepared" holds
    what our kernels make of it besides, which they need once a batch too.
    """
    size = SIZES[options.size]
    (layers, hidden_width), (rows, length), width = size.step_model, size.step_rows, size.widths[0]
    heads = size.columns // width
    model = ModelConfig(
        num_layers=layers, width=size.columns, num_heads=heads, num_kv_heads=heads // size.heads_per_kv_head,
        head_width=width, hidden_width=hidden_width, dtype=size.dtype, attention_impl="xla",
    )  # fmt: skip
    optim = OptimConfig(method=AdamWConfig(), peak_lr=1e-3, schedule=WarmupCosine(num_warmup_steps=1))
    optimizer = make_optimizer(optim, 100, abstract_params(model, VOCAB), model)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    step = make_train_step(language_model_loss(model, LossConfig(), num_sources=1), optimizer, mesh=mesh)
    state = init_state(model, VOCAB, optimizer, 0, mesh)
    ids = segments(rows, length + 1, size.median_document, 0)
    starts = np.maximum.accumulate(
        np.diff(ids, axis=1, prepend=-1).astype(bool) * np.arange(length + 1), axis=1
    )
    batch = jax.device_put(
        Batch(
            tokens_BT1=np.random.default_rng(0).integers(0, VOCAB, ids.shape).astype(np.int32),
            segment_ids_BT1=ids,
            positions_BT1=(np.arange(length + 1) - starts).astype(np.int32),
            weights_BT=(ids[:, 1:] == ids[:, :-1]).astype(np.float32),
            source_B=np.zeros(rows, np.int32),
        )
    )
    spec = model.spec(model.kind(0))
    impl = next(name for name in size.implementations if name in OURS)
    shapes = shapes_of(size, width, length, rows)
    plan = jax.jit(lambda ids: make_plan(ids, spec, seq_len=length))
    prepared = jax.jit(
        lambda ids: prepare_plan(make_plan(ids, spec, seq_len=length), *shapes[:2], spec=spec, impl=impl)
    )
    given = [(batch.segment_ids_BT1[:, :-1],)]
    plans = {"plan": (plan, given)}
    if isinstance(implementation(impl, shapes), Entrant):
        plans["prepared"] = prepared, given

    def one_step() -> jax.Array:
        nonlocal state
        state, metrics = step(state, batch)
        return metrics["loss"]

    samples = interleaved({"step": (one_step, [()]), **plans}, options)
    ms = {name: 1e3 * statistics.median(of) for name, of in samples.items()}
    return {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "tokens": rows * length,
        "params": sum(x.size for x in jax.tree.leaves(abstract_params(model, VOCAB))),
        "prepared_for": impl,
        "ms": ms,
        "share_of_step": {name: ms[name] / ms["step"] for name in plans},
    }


def plan_line(report: Mapping[str, Any]) -> str:
    parts = [
        f"{name} {report['ms'][name]:.3f} ms, {share:.2%}" for name, share in report["share_of_step"].items()
    ]
    return (f"{report['device']}: step of {report['params']:,} parameters on {report['tokens']:,} tokens "
            f"{report['ms']['step']:.1f} ms; " + "; ".join(parts))  # fmt: skip


def run(options: Options, log: Callable[[str], None] = print) -> dict[str, Any]:
    """The whole report; what did not fit in the time is listed as left out."""
    began = time.perf_counter()
    size = SIZES[options.size]
    device = jax.devices()[0]
    peaks = [matmul_peak(size, options)]
    bandwidth = copy_bandwidth(size, options)
    log(f"{device.device_kind}: matrix product {peaks[0]:.1f} TFLOP/s, copy {bandwidth:.0f} GB/s")
    admitted, checks = admit(size, seed=time.time_ns() % 2**31)
    for row in checks:
        log(check_line(row))
    jobs = {}
    for length, width in problems_of(size):
        rows = rows_of(size, length)
        shapes = shapes_of(size, width, length, rows)
        # Packed rows take blocks of their own, hence programs of their own.
        for packing, name in itertools.product(PACKINGS, admitted[width]):
            if knows(name, packing) and (name != "xla" or length <= size.dense_limit):
                plan = plan_of(size, Case(direction="fwd", width=width, length=length, packing=packing), rows)
                jobs[length, width, packing, name] = admitted[width][name], shapes, plan
    programs = {}
    for key, found in compiled(jobs).items():
        if isinstance(found, str):
            log(f"{key} {found}")
        else:
            programs[key] = found
    log(f"{len(PARTS) * len(programs)} programs compiled after {time.perf_counter() - began:.0f} s")
    table, left_out = [], []
    for length, width in problems_of(size):
        for case in cases_of(length, width):
            if time.perf_counter() - began > options.max_seconds:
                left_out.append(dataclasses.asdict(case))
                continue
            entrants = {
                name: (admitted[width][name], programs[length, width, case.packing, name])
                for name in size.implementations
                if (length, width, case.packing, name) in programs
            }
            rows = run_case(size, case, entrants, peaks[0], options) if entrants else []
            table += rows
            for row in rows:
                log(table_line(row))
    compare_with_cudnn(table)
    plans = {
        f"{name} h{width}": plan_ms(size, entrant, width, options)
        for width, entrants in admitted.items()
        for name, entrant in entrants.items()
        if name in OURS
    }
    peaks.append(matmul_peak(size, options))
    return {
        "size": {"name": options.size, **dataclasses.asdict(size)},
        "device": device.device_kind,
        "versions": {"python": platform.python_version(), "jax": jax.__version__, **_versions()},
        "matmul_peak_tflops": peaks,
        "throttled": abs(peaks[1] / peaks[0] - 1) > 0.03,
        "copy_gb_per_s": bandwidth,
        "plan_ms": plans,
        "checks": checks,
        "table": table,
        "left_out": left_out,
        "seconds": time.perf_counter() - began,
    }


def _versions() -> dict[str, str]:
    names = ("jaxlib", "tokamax", "jax-cuda12-plugin", "jax-cuda13-plugin", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13",
             "libtpu")  # fmt: skip
    found = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    return {name: found[name] for name in names if name in found}


def check_line(row: Mapping[str, Any]) -> str:
    head = f"h{row['width']:<4}{row['impl']:14}"
    if "absent" in row:
        return f"{head} absent: {row['absent']}"
    worst = {key: [of[key] for of in row["errors"].values()] for key in ("o", "dq", "dk", "dv")}
    text = " ".join(f"{key} {'NaN' if None in e else f'{max(e):.1e}'}" for key, e in worst.items())
    return f"{head} {'WRONG, not timed: ' + ', '.join(row['wrong']) if row['wrong'] else 'right'} ({text})"


def table_line(row: Mapping[str, Any]) -> str:
    low, high = row["quartiles_ms"]
    line = f"{row['direction']} h{row['width']:<4}{row['length']:>6} {row['packing']:7}{row['impl']:14}"
    line += f"{row['median_ms']:>9.3f} ms {f'{low:.3f}..{high:.3f}':>17}{row['tflops']:>8.1f} TFLOP/s"
    line += f"{100 * row['share_of_peak']:>6.1f} %"
    if "speed_over_cudnn" in row:
        line += f"{row['speed_over_cudnn']:>7.2f}x cuDNN"
    if "ship" in row:
        line += f"  ship {row['ship']} aim {row['aim']}"
    return line + (f"  {row['note']}" if "note" in row else "")


def picture(report: Mapping[str, Any], direction: str) -> bytes:
    """TFLOP/s over the length, a panel for each width."""
    colors = dict(zip(report["size"]["implementations"], plots.COLORS, strict=False))
    panels = []
    for width in report["size"]["widths"]:
        curves = []
        for name in report["size"]["implementations"]:
            rows = sorted(
                (r["length"], r["tflops"])
                for r in report["table"]
                if (r["impl"], r["width"], r["direction"], r["packing"]) == (name, width, direction, "causal")
            )
            if rows:
                x, y = zip(*rows, strict=True)
                curves.append(plots.Curve(label=name, x=x, y=y, color=colors[name], markers=True))
        title = f"{direction}, causal, head width {width}"
        panels.append(
            plots.Panel(title=title, x_label="tokens a row", y_label="useful TFLOP/s", curves=curves)
        )
    return plots.draw(
        panels, title="Attention", subtitle=f"{report['device']}, jax {report['versions']['jax']}"
    )


def main(argv: Sequence[str]) -> int:
    """Run the benchmark that `argv` asks for; exit code 2 on bad input."""
    try:
        options = apply_overrides(Options(), argv)
    except ConfigError as error:
        for fault in error.faults:
            print(f"error: {fault}", file=sys.stderr)
        return 2
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    if options.measure == "plan":
        report = plan_beside_a_step(options)
        write_json_atomic(folder / "plan.json", report)
        print(plan_line(report))
        return 0
    report = run(options)
    write_json_atomic(folder / "attention.json", report)
    for direction in DIRECTIONS:
        if any(row["direction"] == direction for row in report["table"]):
            write_atomic(folder / f"attention_{direction}.png", picture(report, direction))
    if report["throttled"]:
        print(
            f"throttled: the peak went from {report['matmul_peak_tflops'][0]:.1f} to {report['matmul_peak_tflops'][1]:.1f}"
        )
    print(
        f"{len(report['table'])} rows in {report['seconds']:.0f} s, {len(report['left_out'])} cases left out; {folder}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
