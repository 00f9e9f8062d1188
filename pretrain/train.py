"""The one training loop: an objective (batches, a loss, a verdict) and a state, from the config to the summary.

Pretraining, continued pretraining and tuning differ in their config only; reinforcement learning brings another
objective. `train` reads from top to bottom: data, state (fresh, initialized from another run, or resumed), then for every step: batch, step, and what is due
after it. State is a local variable; whatever a killed run needs is in its last checkpoint, and the batch of a
step is a pure function of the config, the tables and the step.
"""

import dataclasses
import json
import statistics
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pretrain import config as config_lib
from pretrain import flops
from pretrain.checkpoint import Checkpointer, CheckpointPolicy, params_sha256, read_item, saved_steps
from pretrain.config import ConfigError, local
from pretrain.data.tables import DataConfig, prepare_tables
from pretrain.distributed import (
    DistributedConfig,
    is_writer,
    leave_if_lost,
    same_everywhere,
    text_of_first,
    wait_for_all,
)
from pretrain.generate import SampleConfig, sample_texts
from pretrain.health import (
    REASONS,
    HealthConfig,
    Ledger,
    StopSignal,
    TooManySkips,
    Watchdog,
    fingerprint_of_hashes,
    hash_leaves,
    named_leaves,
    read_ledger,
    tree_fingerprint,
)
from pretrain.loss import LossConfig
from pretrain.metrics import (
    GoodputClock,
    ProgressView,
    TensorBoardConfig,
    Writers,
    open_progress,
    open_writers,
    read_metrics,
)
from pretrain.model.transformer import ModelConfig, abstract_params
from pretrain.objective import BatchSource, Evaluation, Objective, RowObjective
from pretrain.optim import OptimConfig, make_optimizer
from pretrain.origin import origin
from pretrain.plots import draw_loss
from pretrain.pretrained import Pretrained, load_init
from pretrain.rundir import RunDir, write_atomic, write_json_atomic
from pretrain.sharding import MeshConfig, make_mesh
from pretrain.step import TrainState, abstract_state, check_batch, init_state, make_skip_step, make_train_step

EXIT_PREEMPTED = 75


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How long, where, and how often to look."""

    num_steps: int
    seed: int = 0
    # Like the mesh: fewer devices take more, and the loss differs by rounding only.
    num_microbatches: int = local(1)
    workdir: str = local("runs")
    stop_step: int | None = local(None)
    log_every_steps: int = local(10)
    eval_every_steps: int | None = local(None)
    # A hash of all parameters, which two runs of one config must share: where they part, a chip or a program erred.
    fingerprint_every_steps: int | None = local(1000)
    writers: tuple[Any, ...] = local((TensorBoardConfig(),))

    def __post_init__(self):
        faults = []
        for name in ("num_steps", "num_microbatches", "log_every_steps"):
            if getattr(self, name) < 1:
                faults.append(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("stop_step", "eval_every_steps", "fingerprint_every_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                faults.append(f"{name} must be at least 1 or none, got {value}")
        if faults:
            raise ValueError("\n".join(faults))

    @property
    def last_step(self) -> int:
        """Where this call ends: stop_step, or the end of the schedule."""
        return self.num_steps if self.stop_step is None else min(self.stop_step, self.num_steps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run; fields declared local may change when it resumes, the others are its identity."""

    model: ModelConfig
    data: DataConfig
    optim: OptimConfig
    run: RunConfig
    loss: LossConfig = LossConfig()
    health: HealthConfig = HealthConfig()
    # A checkpoint folder, a model folder, or another Pretrained, whose parameters this run starts from.
    init: str | Pretrained = ""
    mesh: MeshConfig = local(MeshConfig())
    distributed: DistributedConfig = local(DistributedConfig())
    checkpoint: CheckpointPolicy = local(CheckpointPolicy())
    sample: SampleConfig = local(SampleConfig())

    def objective(self) -> Objective:
        """What this run learns; prepares what it reads. Another kind of run is a subclass with its own."""
        data = prepare_tables(self.data, Path(self.run.workdir), self.run.seed)
        return RowObjective(
            data, self.data, self.model, self.loss, seed=self.run.seed, num_steps=self.run.num_steps
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainResult:
    """How a call of `train` ended."""

    folder: Path
    steps: int
    exit_code: int
    summary: dict[str, Any]


def run_dir(config: TrainConfig, name: str) -> RunDir:
    """`<workdir>/<name>/<fingerprint8>`: the same identity is the same run."""
    return RunDir(Path(config.run.workdir) / name / config_lib.fingerprint(config)[:8])


def train(config: TrainConfig, *, name: str, trunk: Path | None = None) -> TrainResult:
    """Train to `run.stop_step` (or the end), resuming when the run folder holds a checkpoint.

    `trunk` is one saved step of a longer or shorter run with the same config otherwise. A new run starts from
    there instead of step 0 and ends with the bits it would have had: the schedules must agree up to that step.

    Raises:
      ConfigError: bad input, refused storage, or a checkpoint of another config.
      AllCheckpointsBad, TooManySkips: see their exit codes.
    """
    run = run_dir(config, name)
    last_step = config.run.last_step
    done = _finished(run, last_step)
    if done is not None:
        print(f"nothing to do: {run.root} has reached step {done['steps']} of {config.run.num_steps}")
        print("\n".join(done["closing"]))
        if last_step < config.run.num_steps:
            print(f"raise run.stop_step above {done['steps']} to go on")
        return TrainResult(folder=run.root, steps=done["steps"], exit_code=0, summary=done)

    mesh = make_mesh(config.mesh)
    with ExitStack() as stack:
        objective = config.objective()
        vocab_size = objective.tokenizer.vocab_size
        optimizer = make_optimizer(
            config.optim, config.run.num_steps, abstract_params(config.model, vocab_size), config.model
        )
        # What is refused is refused before the run has a folder: model against mesh, rows, what the run starts from.
        abstract = abstract_state(config.model, vocab_size, optimizer, mesh, config.health)
        batches = objective.open(mesh)
        stack.callback(batches.close)
        for rows in batches.batch_sizes():
            check_batch(rows, config.run.num_microbatches, mesh)
        params = None
        is_new = trunk is None and not same_everywhere(saved_steps(run.checkpoints))
        if is_new and config.init:
            params = load_init(config.init, config.model, objective.tokenizer, mesh)
        config_json = config_lib.to_json(config)
        if is_writer():
            run.create()
            stack.enter_context(run.lock())
            write_json_atomic(run.config_json, config_json)
            if not (run.root / "tokenizer.json").exists():
                objective.tokenizer.save(run.root / "tokenizer.json")
        wait_for_all("the run folder is ready")
        checkpointer = Checkpointer(run.checkpoints, config_json, objective.fingerprint, config.checkpoint)
        stack.callback(checkpointer.close)
        batches_state: dict[str, Any] = {}
        restored = checkpointer.restore_latest(abstract)
        if restored is not None:
            state, start_step, ledger = restored
            seconds = read_item(run.checkpoints / str(start_step), "meta")["goodput_s"]
            batches_state = read_item(run.checkpoints / str(start_step), "data").get("batches", {})
            print(f"resuming {run.root} from the checkpoint of step {start_step}")
        elif trunk is not None:
            state, ledger, identity = checkpointer.restore_trunk(
                trunk, abstract, may_differ=("run.num_steps",)
            )
            start_step, seconds = int(state.step), {}
            _check_same_rates(config, start_step, identity["run"]["num_steps"])
            print(f"starting {run.root} at step {start_step} of {trunk}")
        else:
            assert is_new, "checkpoints that are there are resumed from or refused"
            state = init_state(
                config.model, vocab_size, optimizer, config.run.seed, mesh, config.health, params
            )
            start_step, ledger, seconds = 0, Ledger(), {}
            print(f"starting {run.root}")
        # Of steps after that checkpoint the run folder knows which ones were skipped.
        written = json.loads(text_of_first(json.dumps(read_ledger(run.ledger_jsonl) if is_writer() else [])))
        ledger, ahead = ledger.resumed(written, start_step, run.ledger_jsonl if is_writer() else None)
        loop = _Loop(
            config,
            run,
            objective,
            batches,
            mesh,
            optimizer,
            checkpointer,
            ledger,
            ahead,
            start_step,
            GoodputClock(seconds),
        )
        batches.restore(batches_state)
        stack.callback(loop.writers.close)
        stack.push(leave_if_lost)
        return loop.run_to(last_step, state)


def _check_same_rates(config: TrainConfig, start_step: int, trunk_steps: int) -> None:
    """Refuse a trunk whose schedule has begun to differ: a decay, a cosine, a line."""
    steps = np.arange(start_step)
    ours, theirs = (config.optim.learning_rate(steps, n) for n in (config.run.num_steps, trunk_steps))
    if not np.array_equal(ours, theirs):
        raise ConfigError(
            f"a branch must have had the rates of its trunk, and from {trunk_steps} to {config.run.num_steps} steps they "
            f"differ before step {start_step}; branch Constant or Wsd before the decay of both"
        )


class _Loop:
    """The steps of one process and what is due after them."""

    def __init__(
        self,
        config: TrainConfig,
        run: RunDir,
        objective: Objective,
        batches: BatchSource,
        mesh: jax.sharding.Mesh,
        optimizer: Any,
        checkpointer: Checkpointer,
        ledger: Ledger,
        ahead: dict[int, dict[str, Any]],
        start_step: int,
        clock: GoodputClock,
    ):
        self.config, self.run, self.objective, self.batches = config, run, objective, batches
        self.checkpointer, self.start_step, self.clock = checkpointer, start_step, clock
        self.ledger, self.ahead = ledger, ahead  # what was skipped, and what is to be skipped again, by step
        self.train_step = make_train_step(
            objective.loss,
            optimizer,
            mesh=mesh,
            num_microbatches=config.run.num_microbatches,
            health=config.health,
            new_data_steps=objective.new_data_steps,
            learning_rate=lambda step: config.optim.learning_rate(step, config.run.num_steps),
            counts=lambda batch: flops.packed_counts(
                config.model, batch.segment_ids_BT1[:, :-1], batch.positions_BT1[:, :-1]
            ),
        )
        self.skip_step = make_skip_step(mesh=mesh, new_data_steps=objective.new_data_steps)
        # What a step executes, by the rows of its batch; known when it has been traced.
        self._step_flops: dict[int, flops.Executed | None] = {}
        self._executed = 0.0  # FLOPs since the last line
        self._packed = {"packed_tokens": 0.0, "packed_pairs": 0.0}  # since the last line
        self._hashes: tuple[int, list[str], Any] | None = (
            None  # on their way from the device: step, names, hashes
        )
        self._passed_tokens = 0  # since the last line, of steps that were skipped without computing them
        self.writers = Writers([])
        if is_writer():
            self.writers, dropped = open_writers(
                run.root, config.run.writers, config_json=config_lib.to_json(config), resume_step=start_step
            )
            clock.lose(dropped)
        self.peak_flops, self.peak_flops_source = flops.peak_flops()
        self._logged = (start_step, self._busy_s())

    def run_to(self, last_step: int, state: TrainState) -> TrainResult:
        """Train until `last_step`, a signal, or too many skipped steps."""
        step = self.start_step
        with (
            StopSignal() as signal,
            Watchdog(report=self.run.root / "hang.txt") as watchdog,
            open_progress(num_steps=self.config.run.num_steps, start_step=step) as progress,
        ):
            pending: tuple[Any, dict[str, Any], float | None] | None = None
            evaluation = self._evaluation_of(step)
            if step and evaluation is None and self._is_due(step, last_step):
                # The process that saved this step was killed before it had evaluated it.
                evaluation = self._evaluate(step, state, progress)
            while step < last_step and not self._asked_to_stop(signal):
                with self.clock.phase("data_wait"):
                    batch = self.batches.next(step, state.params)
                rows = len(batch.tokens_BT1)
                if step + 1 in self.ahead:
                    if pending is not None:
                        with self.clock.phase("step"):
                            self._record(step, *pending, progress)
                    pending = None
                    state = self._skip_again(step + 1, state, progress)
                else:
                    with ExitStack() as compiling:
                        if rows in self._step_flops:
                            compiling.enter_context(self.clock.phase("step"))
                        else:
                            compiling.enter_context(self.clock.phase("compile"))
                            compiling.enter_context(watchdog.patience(3600))
                            self._step_flops[rows] = self._executed_flops(state, batch, progress)
                        state, metrics = self.train_step(state, batch)
                        # Read the metrics of the step before while this one runs: the device never waits for the host.
                        if pending is not None:
                            self._record(step, *pending, progress)
                    pending = metrics, self.batches.report(), rows
                step += 1
                watchdog.beat(step)
                due = self._is_due(step, last_step)
                with self.clock.phase("step"):  # several processes wait for each other, and so for the step
                    self._write_fingerprint()
                    self._fingerprint(step, state)
                    save = step == last_step or self.checkpointer.due(step)
                if due or save:
                    with self.clock.phase("step"):  # it waits for the step to end
                        if pending is not None:
                            self._record(step, *pending, progress)
                        self._write_fingerprint()
                    pending = None
                # Saved first: whatever an evaluation may run into, the steps before it are not lost.
                if save:
                    with watchdog.patience(3600):
                        self._save(step, state)
                if due:
                    with watchdog.patience(3600):
                        evaluation = self._evaluate(step, state, progress)
                self.checkpointer.poll()
            with self.clock.phase("step"):
                if pending is not None:
                    self._record(step, *pending, progress)
                self._write_fingerprint()
            with watchdog.patience(3600):
                self._save(step, state)
                self.checkpointer.wait()
            if step < last_step:
                received = signal.received or "another process was told to stop"
                progress.say(f"{received}: saved at step {step}; the same command goes on from here")
                return TrainResult(folder=self.run.root, steps=step, exit_code=EXIT_PREEMPTED, summary={})
            assert evaluation is not None, "the last step is always evaluated"
            with watchdog.patience(3600):
                summary = self._finish(step, state, evaluation)
        if is_writer():
            print("\n".join(summary["closing"]))
        return TrainResult(folder=self.run.root, steps=step, exit_code=0, summary=summary)

    def _asked_to_stop(self, signal: StopSignal) -> bool:
        """Any process is to stop; what one waits for the others here belongs to the steps, whose rate it lowers."""
        with self.clock.phase("step"):
            return signal.requested_anywhere()

    def _record(
        self,
        step: int,
        metrics: Mapping[str, Any],
        report: Mapping[str, Any],
        rows: int,
        progress: ProgressView,
    ) -> None:
        """Bring the metrics of finished step `step`, which took `rows` rows, to the host: ledger, line, progress."""
        values = jax.device_get(metrics)
        if not values["ok"]:
            entry = self.ledger.skip(
                step,
                loss=values["loss"],
                grad_norm=values["grad_norm"],
                reason=REASONS[int(values["reason"])],
                rows=self.batches.row_ids(step - 1),
            )
            progress.say(f"step {step} skipped: {entry['reason']}")
            if values["consecutive_skips"] > self.config.health.max_consecutive_skips:
                raise TooManySkips(
                    f"at most {self.config.health.max_consecutive_skips} steps may be skipped in a row; step {step} is one "
                    f"more ({entry['reason']}, loss {values['loss']}); look at their rows in {self.run.ledger_jsonl}: the "
                    "same command goes on after them; or lower optim.peak_lr"
                )
        for name in self._packed:
            self._packed[name] += float(values[name])
        executed = self._step_flops[rows]
        if executed is not None:
            queries = self.config.model.num_layers * rows * self.objective.tokens_per_row
            self._executed += executed.total(float(values["packed_pairs"]) / queries)
        if step % self.config.run.log_every_steps and step != self.config.run.last_step:
            return
        logged_step, logged_s = self._logged
        busy_s = self._busy_s()
        elapsed_s = max(busy_s - logged_s, 1e-9)
        tokens = self.objective.tokens_before(step)
        rate = (tokens - self._passed_tokens - self.objective.tokens_before(logged_step)) / elapsed_s
        self._logged, self._passed_tokens = (step, busy_s), 0
        by_source = {
            label: float(nll / weight)
            for label, nll, weight in zip(
                self.objective.labels, values["nll_by_source"], values["weight_by_source"], strict=True
            )
            if weight > 0
        }
        line = {
            "loss": float(values["loss"]),
            "loss_by_source": by_source,
            "grad_norm": float(values["grad_norm"]),
            "learning_rate": float(values["learning_rate"]),
            "skipped": int(values["skipped"]),
            **_router_line(values),
            "tokens": tokens,
            "tokens_per_second": rate,
            "mfu": self._mfu(rate),
            **self._other_utilizations(elapsed_s),
            "seconds": self.clock.total_s(),
            **report,
        }
        self.writers.write(step, "train", line)
        progress.update(step, loss=line["loss"], tokens_per_second=rate)

    def _fingerprint(self, step: int, state: TrainState) -> None:
        """Hash the parameters when that is due; dispatched before the next step takes their buffers."""
        interval = self.config.run.fingerprint_every_steps
        if interval is not None and step % interval == 0:
            self._hashes = step, list(named_leaves(state.params)), hash_leaves(state.params)

    def _write_fingerprint(self) -> None:
        """The line of the last hash, by now a step old, so that nothing waits for it."""
        if self._hashes is not None:
            step, names, hashes = self._hashes
            self._hashes = None
            fingerprint = fingerprint_of_hashes(names, jax.device_get(hashes))
            self.writers.write(step, "fingerprint", {"params_fingerprint": fingerprint})

    def _skip_again(self, step: int, state: TrainState, progress: ProgressView) -> TrainState:
        """The state after `step`, which the ledger's file says was skipped; it has no line of its own."""
        entry = self.ahead.pop(step)
        self.ledger.entries.append(entry)
        self._passed_tokens += self.objective.tokens_before(step) - self.objective.tokens_before(step - 1)
        progress.say(f"step {step} skipped again, as the ledger says: {entry['reason']}")
        return self.skip_step(state, np.asarray(REASONS.index(entry["reason"]), np.int32))

    def _mfu(self, tokens_per_second: float) -> float:
        return flops.mfu(
            self.config.model,
            self.objective.tokenizer.vocab_size,
            self.objective.tokens_per_row,
            tokens_per_second=tokens_per_second,
            peak_flops=self.peak_flops,
        )

    def _executed_flops(self, state: TrainState, batch: Any, progress: ProgressView) -> flops.Executed | None:
        """FLOPs of the step as it is traced; tracing is kept for the call that follows."""
        try:
            return flops.executed_flops_of(self.train_step.trace(state, batch).jaxpr)
        except NotImplementedError as error:  # a number for people, not worth a run
            progress.say(f"hfu is left out: {error}")
            return None

    def _other_utilizations(self, elapsed_s: float) -> dict[str, float]:
        """By what the documents needed, and by what the program executes; counts start anew."""
        needed = flops.flops_of_counts(
            self.config.model,
            self.objective.tokenizer.vocab_size,
            tokens=self._packed["packed_tokens"],
            pairs=self._packed["packed_pairs"],
        )
        self._packed = dict.fromkeys(self._packed, 0.0)
        found = {"mfu_packed": needed / elapsed_s / self.peak_flops}
        if self._executed:
            found["hfu"] = flops.hfu(self._executed, step_seconds=elapsed_s, peak_flops=self.peak_flops)
        self._executed = 0.0
        return found

    def _busy_s(self) -> float:
        """Seconds in steps and in waiting for rows: what throughput is measured over."""
        seconds = self.clock.seconds()
        return seconds["step"] + seconds["data_wait"] + seconds["compile"]

    def _is_due(self, step: int, last_step: int) -> bool:
        """An evaluation belongs to this step."""
        interval = self.config.run.eval_every_steps
        return step == last_step or (interval is not None and step % interval == 0)

    def _evaluation_of(self, step: int) -> Evaluation | None:
        """The evaluation of `step` that an earlier process has written."""
        lines = read_metrics(self.run.metrics_jsonl)
        found = [line for line in lines if line["kind"] == "eval" and line["step"] == step]
        if not same_everywhere([len(found)])[0]:
            return None
        return Evaluation(headline=found[-1]["headline"], values=found[-1])

    def _evaluate(self, step: int, state: TrainState, progress: ProgressView) -> Evaluation:
        """The objective's verdict and a few samples, written and shown."""
        with self.clock.phase("evaluation"):
            evaluation = self.objective.evaluate(state.params)
        with self.clock.phase("sampling"):
            texts = []
            if jax.process_count() == 1:  # one host of many does not hold the model
                texts = sample_texts(
                    state.params, self.config.model, self.objective.tokenizer, self.config.sample
                )
        values = {
            "headline": evaluation.headline,
            **evaluation.values,
            "params_fingerprint": tree_fingerprint(state.params),
            "samples": {str(i): text for i, text in enumerate(texts)},
        }
        self.writers.write(step, "eval", values)
        progress.say(f"step {step}: {evaluation.headline}")
        return evaluation

    def _save(self, step: int, state: TrainState) -> None:
        with self.clock.phase("checkpoint_block"):
            self.writers.flush()
            extras = {
                "ledger": self.ledger,
                "data": {"batches": self.batches.state()},
                "meta": {"goodput_s": self.clock.seconds()},
            }
            self.checkpointer.save(state, step, extras)

    def _finish(self, step: int, state: TrainState, evaluation: Evaluation) -> dict[str, Any]:
        """Write summary, picture and samples; nothing in a process that is not the writer."""
        digest = params_sha256(state.params)  # every process holds a part
        if not is_writer():
            return {}
        records = read_metrics(self.run.metrics_jsonl)
        rates = [r["tokens_per_second"] for r in records if r["kind"] == "train"]
        rate = statistics.median(rates) if rates else None
        seconds = self.clock.seconds()
        with self.clock.phase("evaluation"):
            judged = self.objective.summary(evaluation, self.run.root)
        num_params = flops.params_count(state.params)
        model_line = f"{num_params:,} parameters, step {step}, {self.clock.total_s():.0f} s"
        summary = {
            **judged,
            "closing": [*judged["closing"], model_line],
            "train_tokens": self.objective.tokens_before(step),
            "steps": step,
            "num_steps": self.config.run.num_steps,
            "params": num_params,
            "params_sha256": digest,
            "tokens_per_second": rate,
            "mfu": None if rate is None else self._mfu(rate),
            "peak_flops": self.peak_flops,
            "peak_flops_source": self.peak_flops_source,
            "seconds": sum(seconds.values()),
            "seconds_by_phase": seconds,
            "skipped_steps": len(self.ledger.skipped_steps),
            "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            "origin": origin(),  # of the process that ended the run
        }
        write_atomic(self.run.samples_txt, _samples_text(records))
        write_json_atomic(self.run.summary_json, summary)
        draw_loss(self.run.root)
        return summary


def _router_line(values: Mapping[str, Any]) -> dict[str, Any]:
    """What the routers did, when there are experts; shares by `layer.expert`."""
    if "expert_share" not in values:
        return {}
    share_LE = np.asarray(values["expert_share"])
    return {
        "expert_max_over_mean": float(values["expert_max_over_mean"]),
        "router_z": float(values["router_z"]),
        "expert_share": {f"{layer}.{e}": float(share) for (layer, e), share in np.ndenumerate(share_LE)},
    }


def _finished(run: RunDir, last_step: int) -> dict[str, Any] | None:
    """The summary of a run that has nothing left to do before `last_step`."""
    if not run.summary_json.exists():
        return None
    summary = json.loads(run.summary_json.read_text())
    return summary if summary["steps"] >= last_step else None


def _samples_text(records: Iterable[Mapping[str, Any]]) -> str:
    parts = []
    for record in records:
        if record["kind"] == "eval":
            for text in record["samples"].values():
                parts.append(f"--- step {record['step']} ---\n{text}\n")
    return "\n".join(parts)
