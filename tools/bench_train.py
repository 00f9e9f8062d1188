"""The training step of a config on this machine, without data: tokens a second, utilization, memory, what it spends its time on.

    python -m tools.bench_train --config configs/pretrain/llama_1b.py data.batch_rows=8 run.num_microbatches=2
    python -m tools.bench_train --config FILE bench.out=step.json bench.profile_steps=2 model.attention_impl=xla

The step is the one that `pretrain.main` runs, health guard, optimizer and metrics included; the rows are random tokens
in documents of log-normal length laid end to end, as web text packs. Nothing is read, saved or evaluated. Steps queue
up behind one another as in a run; reported is the median of `bench.blocks` blocks.
"""

import dataclasses
import functools
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pretrain import flops
from pretrain.config import ConfigError, apply_overrides, load_config, parse_argv
from pretrain.data.batch import Batch
from pretrain.kernels.attention.api import choose, problem_of
from pretrain.model.transformer import abstract_params
from pretrain.optim import make_optimizer
from pretrain.origin import origin
from pretrain.rundir import write_json_atomic
from pretrain.sharding import MeshConfig, make_mesh
from pretrain.step import init_state, language_model_loss, make_train_step
from pretrain.tokenizer import BpeConfig
from pretrain.train import TrainConfig
from tools.bench_attention import segments

PREFIX = "bench."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured and where the result goes."""

    blocks: int = 5
    steps: int = 2  # of a block
    median_document: int = 400  # tokens
    profile_steps: int = 0  # also say which kernels these steps spend their time on
    top: int = 10  # kernels that are named
    out: str = ""  # JSON file

    def __post_init__(self):
        faults = [
            f"bench.{name} must be positive, got {getattr(self, name)}"
            for name in ("blocks", "steps", "median_document", "top")
            if getattr(self, name) < 1
        ]
        if self.profile_steps < 0:
            faults.append(f"bench.profile_steps must be at least 0, got {self.profile_steps}")
        if faults:
            raise ConfigError(*faults)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Arguments:
    bench: Options = Options()


def parse(argv: Sequence[str]) -> tuple[Options, TrainConfig]:
    """Our options and the config with its overrides.

    Raises:
      ConfigError: any of it is wrong.
    """
    path, overrides = parse_argv(argv)
    ours = [text for text in overrides if text.startswith(PREFIX)]
    options = apply_overrides(_Arguments(), ours).bench
    config = apply_overrides(load_config(path), [text for text in overrides if text not in ours])
    if not isinstance(config, TrainConfig):
        raise ConfigError(f"{path} must return a TrainConfig, got {type(config).__name__}")
    return options, config


def rows(config: TrainConfig, median_document: int, seed: int) -> Batch:
    """A batch of random tokens; every target within a document counts."""
    B, T1 = config.data.batch_rows, config.data.row_length + 1
    segment_ids = segments(B, T1, median_document, seed)
    place = np.broadcast_to(np.arange(T1, dtype=np.int32), segment_ids.shape)
    first = np.diff(segment_ids, axis=1, prepend=0) != 0
    starts = np.maximum.accumulate(np.where(first, place, 0), axis=1)
    return Batch(
        tokens_BT1=np.random.default_rng(seed).integers(0, _vocab_size(config), (B, T1), np.int32),
        segment_ids_BT1=segment_ids,
        positions_BT1=(place - starts).astype(np.int32),
        weights_BT=(segment_ids[:, 1:] == segment_ids[:, :-1]).astype(np.float32),
        source_B=np.zeros(B, np.int32),
    )


def _vocab_size(config: TrainConfig) -> int:
    """Of a tokenizer that is yet to be trained its size is known; others are asked."""
    tokenizer = config.data.tokenizer
    return (
        tokenizer.vocab_size
        if isinstance(tokenizer, BpeConfig)
        else tokenizer.build(config.data.root, lambda max_bytes: iter(())).vocab_size
    )


def _attention(config: TrainConfig) -> str:
    """What the layers of the first kind take on this machine."""
    model = config.model
    q, k = (
        jax.ShapeDtypeStruct(
            (config.data.batch_rows // config.run.num_microbatches, config.data.row_length, heads, model.head_width),
            model.dtype,
        )
        for heads in (model.num_heads, model.num_kv_heads)
    )  # fmt: skip
    return choose(problem_of(q, k, model.spec(model.kind(0)), packed=True), model.attention_impl).impl


def measure(options: Options, config: TrainConfig) -> dict[str, Any]:
    """The report, as JSON values."""
    model, vocab_size = config.model, _vocab_size(config)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    optimizer = make_optimizer(config.optim, config.run.num_steps, abstract_params(model, vocab_size), model)
    step = make_train_step(
        language_model_loss(model, config.loss, num_sources=1),
        optimizer,
        mesh=mesh,
        num_microbatches=config.run.num_microbatches,
        health=config.health,
        learning_rate=lambda step: config.optim.learning_rate(step, config.run.num_steps),
        counts=lambda batch: flops.packed_counts(
            model, batch.segment_ids_BT1[:, :-1], batch.positions_BT1[:, :-1]
        ),
    )
    state = init_state(model, vocab_size, optimizer, config.run.seed, mesh, config.health)
    batch = jax.device_put(rows(config, options.median_document, seed=0))
    executed = flops.executed_flops_of(step.trace(state, batch).jaxpr)
    began = time.perf_counter()
    state, metrics = step(state, batch)
    losses = [float(metrics["loss"])]
    compile_s = time.perf_counter() - began
    seconds = []
    for _ in range(options.blocks):
        began = time.perf_counter()
        for _ in range(options.steps):
            state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
        seconds.append((time.perf_counter() - began) / options.steps)
    step_s = statistics.median(seconds)
    tokens = config.data.batch_rows * config.data.row_length
    peak, source = flops.peak_flops()
    needed = flops.flops_of_counts(
        model, vocab_size, tokens=float(metrics["packed_tokens"]), pairs=float(metrics["packed_pairs"])
    )
    keys_per_query = float(metrics["packed_pairs"]) / (model.num_layers * tokens)
    report = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "params": flops.count_params(model, vocab_size).total,
        "attention": _attention(config),
        "remat": model.remat,
        "rows": config.data.batch_rows,
        "row_length": config.data.row_length,
        "microbatches": config.run.num_microbatches,
        "first_step_s": compile_s,
        "step_s": step_s,
        "step_range_s": [min(seconds), max(seconds)],
        "tokens_per_second": tokens / step_s,
        "mfu": flops.mfu(
            model, vocab_size, config.data.row_length, tokens_per_second=tokens / step_s, peak_flops=peak
        ),
        "mfu_packed": needed / step_s / peak,
        "hfu": flops.hfu(executed.total(keys_per_query), step_seconds=step_s, peak_flops=peak),
        "peak": source,
        "memory_bytes": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
        "losses": losses,
    }
    if options.profile_steps:

        def some() -> None:
            nonlocal state, metrics
            for _ in range(options.profile_steps):
                state, metrics = step(state, batch)
            jax.block_until_ready(metrics)

        report["profile"] = profile(some, options.profile_steps, options.top)
    return report


def profile(run: Callable[[], None], num_steps: int, top: int) -> dict[str, Any]:
    """Where the time of a step goes, by kernel."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        (path,) = Path(folder).rglob("*.xplane.pb")
        return summed(jax.profiler.ProfileData.from_file(str(path)), num_steps, top)


def summed(data: Any, num_steps: int, top: int) -> dict[str, Any]:
    """The kernels on the streams of the devices, the longest first; none where the profiler sees no device (a CPU)."""
    ms_of: dict[str, float] = defaultdict(float)
    calls_of: dict[str, int] = defaultdict(int)
    for plane in data.planes:
        if not plane.name.startswith("/device:"):
            continue
        for line in plane.lines:
            if line.name.startswith("Stream"):
                for event in line.events:
                    ms_of[event.name] += event.duration_ns / 1e6 / num_steps
                    calls_of[event.name] += 1
    ordered = sorted(ms_of.items(), key=lambda item: -item[1])
    return {
        "busy_ms": sum(ms_of.values()),
        "top": [{"name": name, "ms": ms, "calls": calls_of[name] / num_steps} for name, ms in ordered[:top]],
        "others_ms": sum(ms for _, ms in ordered[top:]),
    }


def table(report: Mapping[str, Any]) -> list[str]:
    """The report for people."""
    low, high = report["step_range_s"]
    memory = report["memory_bytes"]
    lines = [
        f"{report['device']}, jax {report['jax']}, {report['params']:,} parameters, {report['rows']} rows of "
        f"{report['row_length']} in {report['microbatches']} microbatches, attention {report['attention']}, "
        f"remat {report['remat']}",
        f"step {1e3 * report['step_s']:.1f} ms ({1e3 * low:.1f}..{1e3 * high:.1f}), first {report['first_step_s']:.1f} s, "
        f"{report['tokens_per_second']:,.0f} tokens/s",
        f"mfu {report['mfu']:.1%}, mfu_packed {report['mfu_packed']:.1%}, hfu {report['hfu']:.1%} ({report['peak']}); "
        "memory " + ("unknown" if memory is None else f"{memory / 2**30:.1f} GiB"),
    ]
    for row in report.get("profile", {}).get("top", []):
        lines.append(f"{row['ms']:>10.2f} ms {row['calls']:>7.0f} x  {row['name'][:90]}")
    return lines


def main(argv: Sequence[str], log: Callable[[str], None] = functools.partial(print, flush=True)) -> int:
    """Measure what `argv` asks for; exit code 2 on bad input."""
    try:
        options, config = parse(argv)
        report = measure(options, config)
    except ConfigError as error:
        for fault in error.faults:
            print(f"error: {fault}", file=sys.stderr)
        return 2
    log("\n".join(table(report)))
    if options.out:
        write_json_atomic(options.out, {**report, "origin": origin()})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
