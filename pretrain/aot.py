"""`python -m pretrain.aot --config FILE aot.topology=v5p:4x4x4`: know the cost of a step before renting a chip.

The real train step of a config is compiled for chips that are not there, on any CPU: for TPUs with the libtpu wheel
(extra `tpu`), for GPUs with the CUDA plugin (extra `cuda`) and a target description (`aot.target_config=FILE`). It
prints HBM by kind and whether it fits, collectives by kind, mesh axis and loop, FLOPs by our own count and the step
time as an interval, and writes the same as JSON. Nothing is said about numerics.

Exit code 0: it fits, 1: it does not, 2: bad input. The compiler may end its process, hence a child does the work.
"""

import dataclasses
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding

from pretrain import flops
from pretrain.collectives import Collective, find_collectives
from pretrain.config import ConfigError, apply_overrides, load_config, parse_argv
from pretrain.data.batch import Batch
from pretrain.model.transformer import ModelConfig, abstract_params
from pretrain.optim import make_optimizer
from pretrain.roofline import CHIPS, Chip, StepTime, chip_of, predict
from pretrain.rundir import write_json_atomic
from pretrain.sharding import ACTIVATION_RULES, OnMesh, make_mesh, partition_spec
from pretrain.step import TrainState, abstract_state, language_model_loss, make_train_step
from pretrain.train import TrainConfig

EXIT_DOES_NOT_FIT = 1
# libtpu would ask the metadata server of a cloud machine that this is not.
_CHILD_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    # Its lock guards chips, of which there are none: another process with libtpu on this machine is no obstacle.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
_TPU_TOPOLOGY = re.compile(r"(v4|v5e|v5p|v6e|tpu7x):\d+x\d+(x\d+)?")
# What the compiler says of a program that does not fit: at the end all of it, or its temporaries alone before that.
_EXCESS = re.compile(
    r"Used (?P<used>[\d.]+)(?P<used_unit>[KMGT])? of (?P<there>[\d.]+)(?P<there_unit>[KMGT])? hbm"
    r"|HLO temporaries \((?P<temporary>[\d.]+)(?P<temporary_unit>[KMGT])?\) exceeds available HBM "
    r"\((?P<available>[\d.]+)(?P<available_unit>[KMGT])?\)",
    re.IGNORECASE,
)
_UNITS = {None: 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True, kw_only=True)
class AotConfig:
    """For which chips to compile, and where the report goes."""

    topology: str = ""  # TPU: generation and shape, v5p:4x4x4; GPU: slices x hosts x GPUs of a host, 1x1x8
    num_slices: int = 1  # TPU slices joined by the data center network
    target_config: str = ""  # GPU: a file with the target description of XLA
    report: str = ""  # JSON; <run.workdir>/aot/<config>-<topology>.json by default
    hlo: str = ""  # also write the compiled program's text here

    def __post_init__(self):
        faults = []
        if self.topology and not self.target_config and not _TPU_TOPOLOGY.fullmatch(self.topology):
            faults.append(
                f"topology must be v4, v5e, v5p, v6e or tpu7x and a shape like v5e:4x4 or v5p:4x4x4, "
                f"got {self.topology!r}; for GPUs set aot.target_config"
            )
        if self.topology and self.target_config and not re.fullmatch(r"\d+x\d+x\d+", self.topology):
            faults.append(
                f"topology must be slices x hosts x GPUs of a host like 1x1x8, got {self.topology!r}"
            )
        if self.num_slices < 1:
            faults.append(f"num_slices must be at least 1, got {self.num_slices}")
        if self.target_config and not Path(self.target_config).is_file():
            faults.append(f"target_config must name a file, got {self.target_config!r}, which is not there")
        if faults:
            raise ConfigError(*faults)

    @property
    def name(self) -> str:
        """The topology as part of a file name."""
        slices = f"-{self.num_slices}slices" if self.num_slices > 1 else ""
        return self.topology.replace(":", "-") + slices


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Arguments:
    aot: AotConfig = AotConfig()


def main(argv: Sequence[str]) -> int:
    """Compile in a child process; the return value is the process' exit code."""
    if any(os.environ.get(name) != value for name, value in _CHILD_ENVIRONMENT.items()):
        return _in_child(argv)
    try:
        path, aot, config = parse(argv)
        report = compile_step(config, aot)
    except ConfigError as error:
        for fault in error.faults:
            print(f"error: {fault}", file=sys.stderr)
        return 2
    place = Path(aot.report or Path(config.run.workdir) / "aot" / f"{Path(path).stem}-{aot.name}.json")
    place.parent.mkdir(parents=True, exist_ok=True)
    write_json_atomic(place, {"config": path, "overrides": list(argv), **report})
    print("\n".join(table(report)))
    print(f"written to {place}")
    return 0 if report["fits"] else EXIT_DOES_NOT_FIT


def parse(argv: Sequence[str]) -> tuple[str, AotConfig, TrainConfig]:
    """The path, what to compile for, and the training config with its overrides.

    Raises:
      ConfigError: any of it is wrong.
    """
    path, overrides = parse_argv(argv)
    ours = [text for text in overrides if text.startswith("aot.")]
    aot = apply_overrides(_Arguments(), ours).aot
    if not aot.topology:
        raise ConfigError("aot.topology must name what to compile for, got nothing; try aot.topology=v5e:4x4")
    config = apply_overrides(load_config(path), [text for text in overrides if text not in ours])
    if not isinstance(config, TrainConfig):
        raise ConfigError(f"{path} must return a TrainConfig for pretrain.aot, got {type(config).__name__}")
    return path, aot, config


def _in_child(argv: Sequence[str]) -> int:
    command = [sys.executable, "-m", "pretrain.aot", *argv]
    code = subprocess.run(command, env={**os.environ, **_CHILD_ENVIRONMENT}, check=False).returncode
    if code < 0:
        name = signal.Signals(-code).name
        print(f"error: the compiler ended with {name}; its last words are above", file=sys.stderr)
        return 2
    return code


# --- compiling ---------------------------------------------------------------------------------------


def compile_step(config: TrainConfig, aot: AotConfig) -> dict[str, Any]:
    """Compile the train step of `config` for `aot` and say what it costs, as JSON values.

    Raises:
      ConfigError: no such topology, its package is missing, or the config does not suit its devices.
    """
    mesh = make_mesh(config.mesh, _devices(aot))
    chip = _chip(mesh.devices.flat[0].device_kind, aot)
    vocab_size = config.data.tokenizer.vocab_size
    optimizer = make_optimizer(
        config.optim, config.run.num_steps, abstract_params(config.model, vocab_size), config.model
    )
    state = abstract_state(config.model, vocab_size, optimizer, mesh, config.health)
    batch = abstract_batch(config, mesh)

    def step_of(model: ModelConfig) -> OnMesh:
        return make_train_step(
            language_model_loss(model, config.loss, len(config.data.sources)),
            optimizer,
            mesh=mesh,
            num_microbatches=config.run.num_microbatches,
            health=config.health,
            learning_rate=lambda step: config.optim.learning_rate(step, config.run.num_steps),
        )

    step = step_of(config.model)
    began = time.perf_counter()
    # A kernel visits what the documents need, and there are none yet: whole rows are counted, an upper bound.
    keys_per_query = (config.data.row_length + 1) / 2
    executed = flops.executed_flops_of(step.trace(state, batch).jaxpr).total(keys_per_query)
    trace_s = time.perf_counter() - began
    print(
        f"traced in {trace_s:.0f} s; compiling for {mesh.size} x {mesh.devices.flat[0].device_kind}",
        flush=True,
    )
    report: dict[str, Any] = {
        "topology": aot.topology,
        "num_slices": aot.num_slices,
        "device_kind": mesh.devices.flat[0].device_kind,
        "num_devices": mesh.size,
        "mesh": {axis: size for axis, size in mesh.shape.items() if size > 1},
        "params": flops.count_params(config.model, vocab_size).total,
        "batch_rows": config.data.batch_rows,
        "row_length": config.data.row_length,
        "num_microbatches": config.run.num_microbatches,
        "remat": config.model.remat,
        "jax": jax.__version__,
        "flops": _flops(config, vocab_size, executed, mesh.size),
    }
    sizes = _resident_bytes(state, batch)
    compiled, excess = _compile(step.lower(state, batch), sum(sizes.values()))
    report["compile_s"] = round(time.perf_counter() - began - trace_s, 1)
    if compiled is None:
        assert excess is not None
        used, capacity = excess
        rest = {"temporaries, code and outputs": max(0.0, used - sum(sizes.values()))}
        report |= {"fits": False, "hbm": _hbm(sizes | rest, capacity)}
        return report
    analysis: Any = compiled.memory_analysis()
    sizes |= {
        "outputs": max(0, analysis.output_size_in_bytes - analysis.alias_size_in_bytes),
        "temporaries": analysis.temp_size_in_bytes,
        "code": analysis.generated_code_size_in_bytes,
    }
    hlo = compiled.as_text() or ""
    if aot.hlo:
        Path(aot.hlo).write_text(hlo)
    collectives = find_collectives(hlo, dict(mesh.shape))
    report |= {
        "fits": sum(sizes.values()) <= chip.hbm_bytes,
        "hbm": _hbm(sizes, chip.hbm_bytes),
        "collectives": _collective_rows(collectives),
    }
    traffic = memory_bytes(config, mesh, sizes)
    step_time = predict(
        chip,
        executed_flops=executed / mesh.size,
        memory_bytes=traffic,
        sent_bytes=_sent_bytes(collectives),
        slow_axes=slow_axes(mesh),
    )
    return report | {"step_time": _step_time(step_time, chip, traffic, report["flops"])}


def _chip(device_kind: str, aot: AotConfig) -> Chip:
    """Rates of the device; a GPU's target description names it as well."""
    described = Path(aot.target_config).read_text() if aot.target_config else ""
    chip = chip_of(device_kind) or chip_of(described)
    if chip is None:
        known = ", ".join(chip.name for _, chip in CHIPS)
        raise ConfigError(
            f"the chip must be one of {known}, got {device_kind!r}; add its rates to pretrain/roofline.py"
        )
    return chip


def _devices(aot: AotConfig) -> list[Any]:
    """The devices of the topology, none of which is here."""
    try:
        if aot.target_config:
            settings = {"target_config": Path(aot.target_config).read_text(), "topology": aot.topology}
            return list(topologies.get_topology_desc(platform="cuda", **settings).devices)
        settings = {"num_slices": aot.num_slices} if aot.num_slices > 1 else {}
        return list(topologies.get_topology_desc(aot.topology, platform="tpu", **settings).devices)
    except (RuntimeError, ValueError, KeyError, NotImplementedError, FileNotFoundError) as error:
        line = " ".join(str(error).split())[:300]
        extra = "cuda" if aot.target_config else "tpu"
        raise ConfigError(
            f"aot.topology must be one that the compiler knows, got {aot.topology!r} with num_slices={aot.num_slices}; "
            f"is the extra [{extra}] installed? ({line})"
        ) from error


def abstract_batch(config: TrainConfig, mesh: Mesh) -> Batch:
    """Shapes and layouts of a batch, nothing allocated."""
    B, T = config.data.batch_rows, config.data.row_length

    def array(dtype: str, *shape: int) -> Any:
        spec = partition_spec(("batch", *[None] * (len(shape) - 1)), shape, ACTIVATION_RULES, mesh)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    return Batch(
        tokens_BT1=array("int32", B, T + 1),
        segment_ids_BT1=array("int32", B, T + 1),
        positions_BT1=array("int32", B, T + 1),
        weights_BT=array("float32", B, T),
        source_B=array("int32", B),
    )


def _compile(lowered: Any, resident_bytes: float) -> tuple[Any | None, tuple[float, float] | None]:
    """The compiled step, or the bytes it would use and those there are."""
    try:
        return lowered.compile(), None
    except jax.errors.JaxRuntimeError as error:
        excess = excess_bytes(str(error), resident_bytes)
        if excess is None:
            raise
        return None, excess


def excess_bytes(text: str, resident_bytes: float) -> tuple[float, float] | None:
    """Bytes used and there, from the compiler's words; None when they are about something else."""
    found = _EXCESS.search(text)
    if found is None:
        return None

    def size(name: str) -> float:
        unit = found[f"{name}_unit"]
        return float(found[name]) * _UNITS[unit and unit.upper()]

    if found["used"] is not None:
        return size("used"), size("there")
    return resident_bytes + size("temporary"), size("available")


# --- the report --------------------------------------------------------------------------------------


def _resident_bytes(state: TrainState, batch: Batch) -> dict[str, float]:
    """Bytes on one device of what a step is given, by kind."""

    def total(tree: Any) -> float:
        return float(
            sum(
                math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
                for leaf in jax.tree.leaves(tree)
            )
        )

    return {
        "parameters": total(state.params),
        "optimizer state": total(state.opt_state),
        "batch and counters": total(batch) + total((state.step, state.health)),
    }


def _hbm(sizes: Mapping[str, float], capacity: float) -> dict[str, Any]:
    used = sum(sizes.values())
    return {
        "by_kind_bytes": dict(sizes),
        "used_bytes": used,
        "capacity_bytes": capacity,
        "free_bytes": capacity - used,
    }


def _flops(config: TrainConfig, vocab_size: int, executed: float, num_devices: int) -> dict[str, float]:
    tokens = config.data.batch_rows * config.data.row_length
    per_token = flops.flops_per_token(config.model, vocab_size, config.data.row_length)
    return {
        "model_per_token": per_token,
        "executed_per_token": executed / tokens,
        "model_per_step_per_device": per_token * tokens / num_devices,
        "executed_per_step_per_device": executed / num_devices,
    }


def _sent_bytes(collectives: Iterable[Collective]) -> dict[tuple[str, ...], float]:
    sent: dict[tuple[str, ...], float] = defaultdict(float)
    for item in collectives:
        if item.axes:
            sent[item.axes] += item.bytes_per_step
    return dict(sent)


def _collective_rows(collectives: Iterable[Collective]) -> list[dict[str, Any]]:
    """Instructions, executions and bytes by (axes, kind, inside or outside of loops)."""
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    for item in collectives:
        if not item.axes:
            continue
        key = ("+".join(item.axes), item.kind, "inside" if item.loop_depth else "outside")
        row = rows.setdefault(key, {"instructions": 0, "executions": 0, "bytes_sent": 0.0})
        row["instructions"] += 1
        row["executions"] += item.executions
        row["bytes_sent"] += item.bytes_per_step
    return [
        {"axes": axes, "kind": kind, "loops": where, **row}
        for (axes, kind, where), row in sorted(rows.items())
    ]


def memory_bytes(config: TrainConfig, mesh: Mesh, sizes: Mapping[str, float]) -> float:
    """An estimate of the HBM traffic of a step on one device.

    Resident arrays are read and written once, gradients as well; in every microbatch weights are read as they are
    used (once forward, twice backward, once more to recompute) and temporaries written and read once.
    """
    state = 2 * (sizes["parameters"] + sizes["optimizer state"]) + 2 * sizes["parameters"]
    passes = 3 if config.model.remat == "none" else 4
    weights = passes * _used_weight_bytes(config.model, config.data.tokenizer.vocab_size, mesh)
    return (
        state + config.run.num_microbatches * weights + 2 * sizes["temporaries"] * config.run.num_microbatches
    )


def _used_weight_bytes(model: ModelConfig, vocab_size: int, mesh: Mesh) -> float:
    """Weights that one device multiplies with, in the compute dtype: fsdp gathers, tensor and expert do not."""
    total = flops.count_params(model, vocab_size).total
    experts = 0
    if model.moe is not None:
        experts = model.num_layers * model.moe.num_experts * 3 * model.width * model.hidden_width
    itemsize = 2 if model.dtype == "bfloat16" else 4
    return itemsize * (total - experts + experts / mesh.shape["expert"]) / mesh.shape["tensor"]


def slow_axes(mesh: Mesh) -> frozenset[str]:
    """The axes along which one comes from one slice (of GPUs: one host) to another."""
    slices = np.vectorize(lambda device: getattr(device, "slice_index", None) or 0)(mesh.devices)
    return frozenset(
        axis for dim, axis in enumerate(mesh.axis_names) if np.any(slices != slices.take([0], axis=dim))
    )


def _step_time(
    step_time: StepTime, chip: Chip, traffic: float, counted: Mapping[str, float]
) -> dict[str, Any]:
    needed = counted["model_per_step_per_device"] / chip.peak_flops
    return {
        "compute_s": step_time.compute_s,
        "memory_s": step_time.memory_s,
        "memory_bytes": traffic,
        "links_s": dict(step_time.links_s),
        "interval_s": [step_time.fastest_s, step_time.slowest_s],
        "mfu_bounds": [needed / step_time.slowest_s, needed / step_time.fastest_s],
        "peak_flops": chip.peak_flops,
    }


def table(report: Mapping[str, Any]) -> list[str]:
    """The report as lines for people."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in report["mesh"].items()) or "one device"
    lines = [
        f"{report['num_devices']} x {report['device_kind']} ({report['topology']}, {report['num_slices']} slice), {mesh}",
        f"{report['params'] / 1e9:.2f}B parameters, {report['batch_rows']} rows x {report['row_length']} tokens in "
        f"{report['num_microbatches']} microbatches, remat {report['remat']}; compiled in {report['compile_s']:.0f} s",
        "",
        f"{'HBM of one device':34} {'MiB':>10}",
    ]
    hbm = report["hbm"]
    for kind, size in hbm["by_kind_bytes"].items():
        lines.append(f"  {kind:32} {size / 2**20:10,.0f}")
    lines.append(f"  {'used':32} {hbm['used_bytes'] / 2**20:10,.0f}")
    lines.append(f"  {'there is':32} {hbm['capacity_bytes'] / 2**20:10,.0f}")
    lines.append(
        f"  {'fits' if report['fits'] else 'DOES NOT FIT, over by':32} {abs(hbm['free_bytes']) / 2**20:10,.0f}"
    )
    if report.get("collectives") is not None:
        lines += [
            "",
            f"{'collectives over':20} {'kind':20} {'loops':8} {'written':>8} {'run a step':>11} {'GB sent':>9}",
        ]
        for row in report["collectives"]:
            lines.append(
                f"  {row['axes']:18} {row['kind']:20} {row['loops']:8} {row['instructions']:8} "
                f"{row['executions']:11,} {row['bytes_sent'] / 1e9:9.3f}"
            )
    counted = report["flops"]
    ratio = counted["executed_per_token"] / counted["model_per_token"]
    lines += [
        "",
        f"FLOPs per token: {counted['model_per_token']:.4g} by the model, {counted['executed_per_token']:.4g} executed "
        f"({ratio:.2f}x, recomputation and masked blocks included)",
    ]
    if step := report.get("step_time"):
        links = ", ".join(f"{axes} {seconds:.3f}" for axes, seconds in step["links_s"].items()) or "none"
        low, high = step["interval_s"]
        worst, best = step["mfu_bounds"]
        lines += [
            f"step: compute {step['compute_s']:.3f} s, memory {step['memory_s']:.3f} s, links {links} s",
            f"step time between {low:.3f} s (all overlaps) and {high:.3f} s (nothing does); mfu {worst:.1%} to {best:.1%}",
        ]
    return lines


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
