"""Metric lines to Weights & Biases: an optional view, named by a config file (`[wandb]` extra)."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import wandb

from pretrain.metrics import Value, scalars


@dataclasses.dataclass(frozen=True, kw_only=True)
class WandbConfig:
    """Where the run appears. The run's name and id are those of its folder, so a resume finds it again.

    With mode="offline" nothing leaves the machine: files in `<run folder>/wandb` for `wandb sync`.
    """

    project: str
    entity: str | None = None
    mode: Literal["online", "offline"] = "online"

    def build(
        self, folder: Path, *, config_json: Mapping[str, Any], resume_step: int | None
    ) -> "WandbWriter":
        return WandbWriter(self, folder, config_json=config_json)


class WandbWriter:
    """Scalars named as in TensorBoard, over `train_step`.

    W&B refuses to go back in its own step counter, which a resume must do; steps are logged as a value and
    used as the x axis. What a resume repeats is therefore there twice; `metrics.jsonl` stays the record.
    """

    def __init__(self, config: WandbConfig, folder: Path, *, config_json: Mapping[str, Any]):
        self._run = wandb.init(
            project=config.project,
            entity=config.entity,
            mode=config.mode,
            dir=str(folder),
            group=folder.parent.name,
            name=f"{folder.parent.name}-{folder.name}",
            id=f"{folder.parent.name}-{folder.name}",
            resume="allow",
            config=dict(config_json),
            # The run folder is the record; no code, no console output and no machine data leave it.
            settings=wandb.Settings(
                console="off", save_code=False, x_disable_stats=True, x_disable_meta=True
            ),
        )
        self._run.define_metric("train_step")
        self._run.define_metric("*", step_metric="train_step")

    def write(self, step: int, kind: str, values: Mapping[str, Value]) -> None:
        self._run.log({"train_step": step, **dict(scalars(kind, values))})

    def flush(self) -> None:
        """W&B sends from a process of its own, there is nothing to wait for."""

    def close(self) -> None:
        self._run.finish()
