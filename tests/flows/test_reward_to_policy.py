"""Flow: a base model, problems and a reward to a better policy, through the entry point that people call."""

import dataclasses
import json
from pathlib import Path

import pytest

from pretrain.config import apply_overrides, load_config
from pretrain.rl.grpo import RlConfig
from pretrain.rl.reward import RandomReward
from pretrain.train import train

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow
TINY = ["model.num_layers=1", "model.width=32", "model.num_heads=2", "model.num_kv_heads=1", "model.head_width=16",
        "model.hidden_width=64"]  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("base")
    config = apply_overrides(
        load_config(ROOT / "configs/rl/arithmetic_base.py"),
        [*TINY, f"run.workdir={workdir}", "run.num_steps=30", "run.writers=()"],
    )
    return train(config, name="base").folder


def policy(base: Path, workdir: Path, *overrides: str) -> RlConfig:
    config = apply_overrides(
        load_config(ROOT / "configs/rl/arithmetic_grpo.py"),
        [
            *TINY, f"init={base}", f"run.workdir={workdir}", "run.num_steps=4", "run.writers=()", "run.eval_every_steps=4",
            "run.log_every_steps=1", "data.prompts_per_step=4", "data.samples_per_prompt=4", "data.slots=16",
            "data.updates_per_rollout=2", "checkpoint.every_steps=none", "optim.peak_lr=1e-3", "optim.schedule.num_warmup_steps=1", "loss.kl_weight=0.01",
            *overrides,
        ],
    )  # fmt: skip
    # So small a base earns nothing; a random reward gives every group something to differ in.
    return dataclasses.replace(config, data=dataclasses.replace(config.data, reward=RandomReward()))


def test_stopping_inside_a_rollout_and_going_on_equals_the_uninterrupted_run(base, tmp_path):
    whole = train(policy(base, tmp_path / "whole"), name="policy")
    lines = [json.loads(line) for line in (whole.folder / "metrics.jsonl").read_text().splitlines()]
    rewards = [line["reward_mean"] for line in lines if line["kind"] == "train"]
    assert len(rewards) == 4
    assert rewards[0] == rewards[1], "two steps learn from one rollout"
    assert any(line["loss"] != 0 for line in lines if line["kind"] == "train")
    assert {"val_accuracy", "params_sha256"} <= whole.summary.keys()
    for stop in (1, 3, 4):
        part = train(policy(base, tmp_path / "parts", f"run.stop_step={stop}"), name="policy")
    assert part.summary["params_sha256"] == whole.summary["params_sha256"]


def test_a_policy_that_starts_from_nothing_is_refused():
    with pytest.raises(ValueError, match="init must name the policy"):
        apply_overrides(load_config(ROOT / "configs/rl/arithmetic_grpo.py"), ["init="])
