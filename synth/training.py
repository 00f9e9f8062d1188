"""Training runs as parts of a pipeline: a learner and files of texts -> `pretrain.train` in a job -> what it says.

Nothing that depends on the machine or the clock is in the outcome, so what a stage writes about a run is the same
bytes after any number of kills; seconds and tokens a second are in the run's own summary.
"""

import contextlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pretrain.checkpoint import CheckpointPolicy
from pretrain.config import ConfigError, local
from pretrain.data.mixture import MixtureStage
from pretrain.data.source import JsonlConfig
from pretrain.data.tables import DataConfig
from pretrain.flops import flops_per_token
from pretrain.generate import SampleConfig
from pretrain.jobs.api import Done, Job, Jobs, JobsConfig, JobsFailed, Outcome, Raised
from pretrain.jobs.api import Failure as JobFailure
from pretrain.jobs.call import invoke
from pretrain.loss import LossConfig
from pretrain.metrics import read_metrics
from pretrain.model.transformer import ModelConfig
from pretrain.optim import OptimConfig
from pretrain.sharding import MeshConfig
from pretrain.tokenizer import TokenizerConfig
from pretrain.train import RunConfig, TrainConfig, train

_ALL = 1 << 40  # bytes: every held-out text is scored


@dataclass(frozen=True, kw_only=True)
class Learner:
    """What is trained and how, beside its texts and the number of steps."""

    model: ModelConfig
    optim: OptimConfig
    row_length: int
    batch_rows: int
    num_microbatches: int = 1
    loss: LossConfig = field(default_factory=LossConfig)
    mesh: MeshConfig = local(MeshConfig())
    checkpoint: CheckpointPolicy = local(CheckpointPolicy())
    num_evals: int = local(20)

    def __post_init__(self):
        if self.num_evals < 1:
            raise ConfigError(f"num_evals must be at least 1, got {self.num_evals}")

    @property
    def tokens_per_step(self) -> int:
        """Positions of a batch, padding included."""
        return self.row_length * self.batch_rows

    def flops(self, vocab_size: int, num_tokens: float) -> float:
        """Forward and backward over so many tokens."""
        return flops_per_token(self.model, vocab_size, self.row_length) * num_tokens


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Files of documents, as `JsonlConfig` finds them, with their share of the rows; share 0 is only evaluated.

    `pairs` says that each has a `first` text, and that only the second is learned.
    """

    name: str
    path: str
    share: float = 1.0
    max_epochs: float | None = None
    pairs: bool = False

    def source(self) -> JsonlConfig:
        """As a source of pretraining: all of it on one side of the split."""
        return JsonlConfig(
            name=self.name,
            path=self.path,
            max_epochs=self.max_epochs,
            heldout_percent=0.0 if self.share else 100.0,
            first_key="first" if self.pairs else None,
            on_overflow="truncate",
        )


def training_config(
    learner: Learner,
    texts: Sequence[Texts],
    *,
    tokenizer: TokenizerConfig,
    num_steps: int,
    seed: int,
    workdir: Path,
    root: Path,
    init: Path | None = None,
) -> TrainConfig:
    """The run of `learner` on `texts` below `root`; `init` is a checkpoint folder to start from."""
    return TrainConfig(
        model=learner.model,
        data=DataConfig(
            sources=tuple(t.source() for t in texts),
            tokenizer=tokenizer,
            row_length=learner.row_length,
            batch_rows=learner.batch_rows,
            stages=(MixtureStage(start_step=0, weights={t.name: t.share for t in texts if t.share}),),
            heldout_max_bytes=_ALL,
            root=str(root),
        ),
        optim=learner.optim,
        run=RunConfig(
            num_steps=num_steps,
            seed=seed,
            num_microbatches=learner.num_microbatches,
            workdir=str(workdir),
            log_every_steps=max(1, num_steps // 50),
            eval_every_steps=max(1, num_steps // learner.num_evals),
            writers=(),
        ),
        loss=learner.loss,
        init="" if init is None else str(init),
        mesh=learner.mesh,
        checkpoint=learner.checkpoint,
        sample=SampleConfig(prompts=()),
    )


def train_in_job(config: TrainConfig, name: str) -> dict[str, Any]:
    """Train to the end, or go on; what was reached. `checkpoint_with` finds the parameters again.

    Raises:
      InterruptedError: the run was told to stop; it has saved, and the same call goes on.
    """
    result = train(config, name=name)
    if result.exit_code:
        raise InterruptedError(f"{result.folder} stopped at step {result.steps} of {config.run.num_steps}")
    summary = result.summary
    report = summary["data"]
    evals = [line for line in read_metrics(result.folder / "metrics.jsonl") if line["kind"] == "eval"]
    return {
        "steps": result.steps,
        "params": summary["params"],
        "params_sha256": summary["params_sha256"],
        "train_tokens": summary["train_tokens"],
        "rows": {name: source["train"]["rows"] for name, source in report.items()},
        "bits_per_byte": summary["val_bits_per_byte_by_source"],
        "nats_per_token": _nats(summary["val_bits_per_byte_by_source"], report),
        "curve": [[line["step"], _nats(line["bits_per_byte_by_source"], report)] for line in evals],
        "skipped_steps": summary["skipped_steps"],
    }


def checkpoint_with(folder: Path, params_sha256: str) -> Path:
    """The checkpoints of the run below `folder` that ended with these parameters.

    By content, because the name of a run folder depends on the path of what it started from.

    Raises:
      ConfigError: there is none.
    """
    for path in sorted(folder.glob("*/summary.json")):
        if json.loads(path.read_text())["params_sha256"] == params_sha256:
            return path.parent / "checkpoints"
    raise ConfigError(
        f"{folder} must hold a finished run with the parameters {params_sha256[:12]}, it does not; write "
        "\"run.fresh=('STAGE',)\" with the name of its stage to train it again"
    )


def _nats(bits_per_byte: Mapping[str, float], report: Mapping[str, Any]) -> dict[str, float]:
    """Nats per target token, by source."""
    found = {}
    for name, bits in bits_per_byte.items():
        heldout = report[name]["heldout"]
        found[name] = bits * math.log(2) * heldout["text_bytes"] / heldout["target_tokens"]
    return found


# --- jobs --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class HereConfig:
    """Jobs in this process, one after the other: no interpreter to start. What they print goes to `<name>.log`."""

    def build(self, folder: Path) -> Jobs:
        return Here(folder)


@dataclass(frozen=True)
class Here:
    """See `HereConfig`."""

    folder: Path

    def run(self, jobs: Iterable[Job]) -> Iterator[Outcome]:
        self.folder.mkdir(parents=True, exist_ok=True)
        for job in jobs:
            with open(self.folder / f"{job.name}.log", "a") as log, contextlib.redirect_stdout(log):
                outcome = invoke(job)
            yield outcome


def in_order(runner: JobsConfig, folder: Path, jobs: Sequence[Job]) -> Iterator[Any]:
    """What the jobs return, in the order of `jobs`, each as soon as those before it are there.

    Raises:
      ConfigError: a job found bad input. JobsFailed: other failures. In both cases all jobs have ended.
    """
    ended: dict[str, Outcome] = {}
    waiting = [job.name for job in jobs]
    for outcome in runner.build(folder).run(jobs):
        ended[outcome.name] = outcome
        while waiting and isinstance(done := ended.get(waiting[0]), Done):
            waiting.pop(0)
            yield done.value
    failures = [outcome for outcome in ended.values() if isinstance(outcome, JobFailure)]
    faults = [fault for failure in failures if isinstance(failure, Raised) for fault in failure.faults]
    if faults:
        raise ConfigError(*dict.fromkeys(faults))
    if failures:
        raise JobsFailed(failures, len(jobs))


def with_weight_decay(learner: Learner, weight_decay: float) -> Learner:
    """The same learner with another weight decay."""
    return replace(learner, optim=replace(learner.optim, weight_decay=weight_decay))
