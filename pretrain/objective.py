"""What a run learns, from which batches, and how it is judged: the seam between the loop and its purpose.

Pretraining, continued pretraining and tuning predict the next token of prepared rows (`RowObjective`);
reinforcement learning rewards what the model itself writes (`pretrain.rl`). The loop knows neither.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from jax.sharding import Mesh

from pretrain.data.batch import Batch
from pretrain.data.loader import RowBatches
from pretrain.data.tables import DataConfig, PreparedData
from pretrain.evals.baselines import baseline_bits_per_byte
from pretrain.evals.perplexity import heldout_score
from pretrain.loss import LossConfig
from pretrain.model.transformer import ModelConfig
from pretrain.rundir import write_json_atomic
from pretrain.step import LossFunction, language_model_loss, make_eval_step
from pretrain.tokenizer import Tokenizer


class BatchSource(Protocol):
    """Where batches come from: rows of tables, or samples of the model itself."""

    def next(self, step: int, params: Any) -> Batch: ...

    def batch_sizes(self) -> set[int]: ...  # rows that a batch may have

    def row_ids(self, step: int) -> Sequence[Any]: ...  # names of the rows of a batch, for the ledger

    def report(self) -> dict[str, Any]: ...  # JSON: what is worth a line about the batch given last

    def state(self) -> dict[str, Any]: ...  # JSON: what beside the step a resumed run needs

    def restore(self, state: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What an evaluation found: a line for people, numbers for the metrics."""

    headline: str
    values: dict[str, Any]


class Objective(Protocol):
    """What the loop asks of its purpose.

    `labels` name the sources of the loss; `fingerprint` is what may not change; from `new_data_steps` on batches are of
    another kind than before.
    """

    tokenizer: Tokenizer
    labels: Sequence[str]
    fingerprint: str
    tokens_per_row: int
    new_data_steps: Sequence[int]
    loss: LossFunction

    def tokens_before(self, step: int) -> int:
        """Tokens in the batches of all steps before `step`, once the objective is open."""
        ...

    def open(self, mesh: Mesh) -> BatchSource: ...

    def evaluate(self, params: Any) -> Evaluation: ...

    def summary(self, evaluation: Evaluation, folder: Path) -> dict[str, Any]:
        """Entries of summary.json; `closing` among them is printed at the end."""
        ...


class RowObjective:
    """Next-token prediction on packed rows, judged in bits per byte of held-out text beside simple baselines."""

    def __init__(
        self,
        data: PreparedData,
        config: DataConfig,
        model: ModelConfig,
        loss: LossConfig,
        *,
        seed: int,
        num_steps: int,
    ):
        self.data, self._config, self._seed, self._num_steps = data, config, seed, num_steps
        self.tokenizer, self.labels, self.fingerprint = data.tokenizer, data.labels, data.fingerprint
        self.tokens_per_row = config.row_length
        starts = {stage.start_step for stage in (*config.stages, *config.batch_stages)}
        self.new_data_steps = sorted(starts - {0})
        self.loss = language_model_loss(model, loss, len(data.labels))
        self._batches: RowBatches | None = None
        self._eval_step: Any = None

    def open(self, mesh: Mesh) -> RowBatches:
        self._eval_step = make_eval_step(self.loss, mesh=mesh)
        self._batches = RowBatches(
            self.data, self._config, num_steps=self._num_steps, seed=self._seed, mesh=mesh
        )
        return self._batches

    def tokens_before(self, step: int) -> int:
        """Batches may grow (`data.batch_stages`)."""
        assert self._batches is not None, "an objective is opened first"
        return self._batches.plan.first_row(step) * self.tokens_per_row

    def evaluate(self, params: Any) -> Evaluation:
        """Score all held-out rows."""
        assert self._batches is not None, "an objective is opened before it is evaluated"
        if not sum(self.data.heldout_bytes.values()):
            return Evaluation(headline="no text is held out (data.heldout_percent=0): no score", values={})
        score = heldout_score(
            self._eval_step,
            params,
            self._batches.heldout(),
            heldout_bytes=self.data.heldout_bytes,
            labels=self.labels,
        )
        return Evaluation(
            headline=f"{score.bits_per_byte:.4f} bits per byte on held-out text",
            values={
                "bits_per_byte": score.bits_per_byte,
                "bits_per_byte_by_source": score.bits_per_byte_by_source,
                "nats_per_token": score.nats_per_token,
            },
        )

    def summary(self, evaluation: Evaluation, folder: Path) -> dict[str, Any]:
        """The score beside baselines on the same held-out bytes; these depend on the data only and are kept."""
        if "bits_per_byte" not in evaluation.values:
            return {
                "val_bits_per_byte": None,
                "val_bits_per_byte_by_source": {},
                "baseline_bits_per_byte": {},
                "val_bytes": 0,
                "data": self.data.report,
                "closing": [evaluation.headline],
            }
        path = folder / "baselines.json"
        if path.exists():
            baselines = json.loads(path.read_text())
        else:
            baselines = baseline_bits_per_byte(
                self.data.train_rows(),
                self.data.heldout_rows(),
                self.data.heldout_texts(),
                vocab_size=self.tokenizer.vocab_size,
                labels=self.labels,
            )
            write_json_atomic(path, baselines)
        overall = {kind: values["overall"] for kind, values in baselines.items()}
        num_bytes = sum(self.data.heldout_bytes.values())
        return {
            "val_bits_per_byte": evaluation.values["bits_per_byte"],
            "val_bits_per_byte_by_source": evaluation.values["bits_per_byte_by_source"],
            "baseline_bits_per_byte": overall,
            "baseline_bits_per_byte_by_source": baselines,
            "val_bytes": num_bytes,
            "data": self.data.report,
            "closing": _closing(evaluation.values["bits_per_byte"], overall, num_bytes),
        }


def _closing(bits_per_byte: float, baselines: Mapping[str, float], num_bytes: int) -> list[str]:
    """The score beside the baselines on the same bytes, best first."""
    names = {
        "model": "this model",
        "unigram": "unigram, same tokens",
        "bigram": "interpolated bigram, same tokens",
        "xz": "xz -9e, same bytes",
    }
    scores = sorted({"model": bits_per_byte, **baselines}.items(), key=lambda item: item[1])
    return [f"held-out bits per byte, {num_bytes:,} bytes", *(f"  {v:7.4f}  {names[k]}" for k, v in scores)]
