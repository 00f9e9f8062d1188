"""Laws of the loop under faults: a bad step is skipped and stays skipped, a signal in the middle of steps loses nothing."""

import dataclasses
import json
import os
import signal
import threading
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from pretrain import train as loop
from pretrain.checkpoint import restore_params, saved_steps
from pretrain.config import ConfigError, apply_overrides, load_config, local
from pretrain.data.loader import RowBatches
from pretrain.data.mixture import BatchStage
from pretrain.health import TooManySkips, tree_fingerprint
from pretrain.main import main
from pretrain.model.moe import MoeConfig
from pretrain.train import EXIT_PREEMPTED, TrainConfig, run_dir, train

SMOKE = str(Path(__file__).parents[2] / "configs/pretrain/smoke.py")
TINY = (
    "model.num_layers=1", "data.batch_rows=8", "data.row_length=32", "run.num_steps=5", "run.log_every_steps=1",
    "run.eval_every_steps=none", "run.writers=()", "optim.schedule.num_warmup_steps=1",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Poisoned(TrainConfig):
    """A run whose loss is not a number on the batches of some steps, told by the sum of their tokens.

    The steps are no part of its identity: what made a step bad may be gone when the run goes on.
    """

    bad_steps: tuple[int, ...] = local(())

    def objective(self):
        objective = super().objective()
        batches = RowBatches(objective.data, self.data, seed=self.run.seed, mesh=None)
        sums = [int(np.sum(batches.batch_at(step).tokens_BT1)) for step in self.bad_steps]
        sums = jnp.asarray(sums, jnp.int32)
        plain = objective.loss

        def loss(params, batch):
            bad = jnp.any(jnp.sum(batch.tokens_BT1).reshape(1) == sums)
            whole = plain(params, batch)
            return dataclasses.replace(whole, objective=whole.objective * jnp.where(bad, jnp.nan, 1.0))

        objective.loss = loss
        return objective


def poisoned(workdir: Path, bad_steps: tuple[int, ...], *overrides: str) -> Poisoned:
    config = apply_overrides(load_config(SMOKE), [*TINY, f"run.workdir={workdir}", *overrides])
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return Poisoned(**fields, bad_steps=bad_steps)


def item(run, step: int, name: str):
    return json.loads((run.checkpoints / str(step) / name / "metadata").read_text())


def hashes(run, step: int) -> dict[str, str]:
    """Leaf by leaf, of parameters and optimizer state."""
    return {name: value for name, value in all_hashes(run, step).items() if not name.startswith("health.")}


def all_hashes(run, step: int) -> dict[str, str]:
    """The guard's windows and counters as well."""
    leaves = json.loads((run.checkpoints / str(step) / "manifest.json").read_text())["body"]["leaves"]
    return {entry["leaf"]: entry["hash"] for entry in leaves}


def train_lines(run) -> list[dict]:
    lines = [json.loads(line) for line in run.metrics_jsonl.read_text().splitlines()]
    return [line for line in lines if line["kind"] == "train"]


def test_a_step_without_a_finite_loss_is_skipped_and_a_resumed_run_skips_it_too(tmp_path):
    """Batch 2 belongs to step 3. One run goes through, one stops before it and goes on."""
    keep = ("checkpoint.every_steps=1", "checkpoint.keep_last=9")
    whole = poisoned(tmp_path, (2,), *keep)
    assert train(whole, name="whole").exit_code == 0
    run = run_dir(whole, "whole")
    assert hashes(run, 3) == hashes(run, 2)
    assert hashes(run, 4) != hashes(run, 3)
    assert [line["skipped"] for line in train_lines(run)] == [0, 0, 1, 1, 1]
    (entry,) = item(run, 5, "ledger")["entries"]
    assert (entry["event"], entry["step"], entry["reason"]) == ("skip", 3, "loss not finite")
    assert len(entry["rows"]) == 8

    for stop in ("2", "none"):
        parted = poisoned(tmp_path, (2,), f"run.stop_step={stop}")
        assert train(parted, name="parted").exit_code == 0
    again = run_dir(parted, "parted")
    assert item(again, 5, "ledger") == item(run, 5, "ledger")
    assert hashes(again, 5) == hashes(run, 5)


class Killed(Exception):
    """Stands for a SIGKILL: nothing of ours is asked before the run ends."""


@pytest.mark.parametrize("saved", ["(2,)", "()"], ids=["after a checkpoint", "before the first one"])
def test_what_was_skipped_after_the_last_checkpoint_is_skipped_again_whatever_it_would_be_now(
    tmp_path, monkeypatch, saved
):
    """Step 3 is bad in one run that goes through and in one that is killed in step 5; then nothing is bad any more."""
    never = "checkpoint.every_s=none"
    whole = poisoned(tmp_path, (2,), never)
    assert train(whole, name="whole").exit_code == 0

    def until_step_5(self, step, params):
        if step == 4:
            raise Killed
        return next_batch(self, step, params)

    next_batch = RowBatches.next
    killed = poisoned(tmp_path, (2,), never, f"checkpoint.keep_steps={saved}")
    with monkeypatch.context() as patch:
        patch.setattr(RowBatches, "next", until_step_5)
        with pytest.raises(Killed):
            train(killed, name="killed")
    run = run_dir(killed, "killed")
    assert saved_steps(run.checkpoints) == ([2] if saved == "(2,)" else [])
    (entry,) = [json.loads(line) for line in run.ledger_jsonl.read_text().splitlines()]
    assert (entry["event"], entry["step"]) == ("skip", 3)

    with open(run.ledger_jsonl, "a") as file:
        file.write('{"event": "skip", "st')  # cut off by the kill
    healed = poisoned(tmp_path, (), never)
    assert train(healed, name="killed").exit_code == 0
    assert all_hashes(run, 5) == all_hashes(run_dir(whole, "whole"), 5)
    assert item(run, 5, "ledger") == item(run_dir(whole, "whole"), 5, "ledger") == {"entries": [entry]}
    assert [json.loads(line) for line in run.ledger_jsonl.read_text().splitlines()] == [entry]
    assert [line["step"] for line in train_lines(run)] == [1, 2, 4, 5]


def test_too_many_skipped_steps_in_a_row_end_the_run_and_the_next_one_goes_on_after_them(tmp_path):
    config = poisoned(tmp_path, (1, 2, 3), "health.max_consecutive_skips=2")
    with pytest.raises(TooManySkips, match="at most 2 steps may be skipped in a row; step 4 is one more"):
        train(config, name="nan")
    assert TooManySkips.exit_code == 6
    run = run_dir(config, "nan")
    assert [json.loads(line)["step"] for line in run.ledger_jsonl.read_text().splitlines()] == [2, 3, 4]
    assert train(config, name="nan").exit_code == 0
    assert json.loads(run.summary_json.read_text())["skipped_steps"] == 3
    assert [line["step"] for line in train_lines(run)] == [1, 5]


def fingerprints(run) -> dict[int, str]:
    lines = [json.loads(line) for line in run.metrics_jsonl.read_text().splitlines()]
    return {line["step"]: line["params_fingerprint"] for line in lines if line["kind"] == "fingerprint"}


def test_fingerprints_are_those_of_the_parameters_and_two_runs_share_them(tmp_path):
    """One run goes through, one stops at a step with a fingerprint and goes on, one has another seed."""
    often = ("run.fingerprint_every_steps=2", "checkpoint.every_steps=2", "checkpoint.keep_last=9")
    runs = []
    for name, parts in (
        ("whole", ((),)),
        ("parted", (("run.stop_step=2",), ())),
        ("other", (("run.seed=7",),)),
    ):
        for overrides in parts:
            config = poisoned(tmp_path, (), *often, *overrides)
            assert train(config, name=name).exit_code == 0
        runs.append(run_dir(config, name))
    whole, parted, other = (fingerprints(run) for run in runs)
    assert whole == {
        step: tree_fingerprint(restore_params(runs[0].checkpoints, step=step)) for step in (2, 4)
    }
    assert parted == whole
    assert not set(other.values()) & set(whole.values())
    never = poisoned(tmp_path, (), "run.fingerprint_every_steps=none")
    assert train(never, name="never").exit_code == 0
    assert fingerprints(run_dir(never, "never")) == {}
    with pytest.raises(ConfigError, match="fingerprint_every_steps must be at least 1 or none, got 0"):
        poisoned(tmp_path, (), "run.fingerprint_every_steps=0")


def test_sigterm_in_the_middle_of_steps_saves_and_the_same_command_goes_on(tmp_path):
    """It ends with code 75 at a step nobody chose; the run that goes on has the losses of one never stopped."""
    path = ["--config", SMOKE, *TINY, "run.num_steps=100000"]

    def lines_of(workdir):
        (root,) = (tmp_path / workdir / "smoke").glob("*")
        return root, [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]

    def terminate():
        until = time.monotonic() + 120
        while time.monotonic() < until:
            if len(list(tmp_path.glob("stopped/smoke/*/metrics.jsonl"))) and len(lines_of("stopped")[1]) >= 3:
                os.kill(os.getpid(), signal.SIGTERM)
                return
            time.sleep(0.005)

    thread = threading.Thread(target=terminate)
    thread.start()
    code = main([*path, f"run.workdir={tmp_path / 'stopped'}"])
    thread.join()
    assert code == EXIT_PREEMPTED
    root, lines = lines_of("stopped")
    stopped_at = lines[-1]["step"]
    assert (root / "checkpoints" / str(stopped_at) / "manifest.json").exists()
    last = stopped_at + 2
    for workdir in ("stopped", "whole"):
        assert main([*path, f"run.workdir={tmp_path / workdir}", f"run.stop_step={last}"]) == 0
    losses = [
        [line["loss"] for line in lines_of(workdir)[1] if line["kind"] == "train"]
        for workdir in ("stopped", "whole")
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == last


@pytest.mark.slow
def test_the_lines_of_a_model_with_experts_say_how_they_are_used(tmp_path):
    config = apply_overrides(load_config(SMOKE), [*TINY, f"run.workdir={tmp_path}", "run.num_steps=2"])
    experts = MoeConfig(num_experts=4, num_active=2)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, moe=experts))
    assert train(config, name="experts").exit_code == 0
    for line in train_lines(run_dir(config, "experts")):
        assert line["expert_share"].keys() == {"0.0", "0.1", "0.2", "0.3"}
        assert sum(line["expert_share"].values()) == pytest.approx(1)
        assert line["expert_max_over_mean"] == pytest.approx(4 * max(line["expert_share"].values()))
        assert line["router_z"] > 0


@pytest.mark.slow
def test_another_number_of_microbatches_may_finish_a_run(tmp_path):
    """As another mesh may: the loss agrees up to rounding."""
    path = ["--config", SMOKE, *TINY, "run.num_steps=4", "data.batch_rows=16"]
    losses = []
    for workdir, runs in {"one": ("1",), "two": ("1", "2")}.items():
        for index, number in enumerate(runs):
            stop = "none" if index == len(runs) - 1 else "2"
            arguments = [f"run.workdir={tmp_path / workdir}", f"run.num_microbatches={number}"]
            assert main([*path, *arguments, f"run.stop_step={stop}"]) == 0
        (metrics,) = (tmp_path / workdir).glob("smoke/*/metrics.jsonl")
        lines = [json.loads(line) for line in metrics.read_text().splitlines()]
        losses.append([line["loss"] for line in lines if line["kind"] == "train"])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-6)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unlucky(TrainConfig):
    """A run whose evaluations fail, as long as `fails`."""

    fails: bool = local(True)

    def objective(self):
        objective = super().objective()
        if self.fails:
            objective.evaluate = self._fail
        return objective

    def _fail(self, params):
        raise MemoryError("no room for an evaluation")


def test_an_evaluation_that_fails_loses_no_step_and_is_made_up_for(tmp_path):
    config = apply_overrides(
        load_config(SMOKE),
        [*TINY, f"run.workdir={tmp_path}", "run.eval_every_steps=2", "checkpoint.every_steps=2"],
    )
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    unlucky = Unlucky(**fields)
    run = run_dir(unlucky, "run")
    with pytest.raises(MemoryError):
        train(unlucky, name="run")
    assert saved_steps(run.checkpoints) == [2]
    assert train(dataclasses.replace(unlucky, fails=False), name="run").exit_code == 0
    lines = [json.loads(line) for line in run.metrics_jsonl.read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "eval"] == [2, 4, 5]

    # Killed between the last save and the summary: nothing is evaluated again.
    run.summary_json.unlink()
    assert train(unlucky, name="run").exit_code == 0
    lines = [json.loads(line) for line in run.metrics_jsonl.read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "eval"] == [2, 4, 5]


def test_a_run_with_nothing_held_out_ends_without_a_score(tmp_path, capsys):
    path = ["--config", SMOKE, *TINY, f"run.workdir={tmp_path}", "run.num_steps=2", "data.heldout_percent=0"]
    assert main(path) == 0
    assert "no text is held out" in capsys.readouterr().out
    (summary,) = tmp_path.glob("smoke/*/summary.json")
    assert json.loads(summary.read_text())["val_bits_per_byte"] is None


def test_tokens_are_those_of_the_batches_that_were_read(tmp_path):
    """3 steps of 8 rows, 2 of 16."""
    config = apply_overrides(load_config(SMOKE), [*TINY, f"run.workdir={tmp_path}"])
    stages = (BatchStage(start_step=0, batch_rows=8), BatchStage(start_step=3, batch_rows=16))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, batch_stages=stages))
    summary = train(config, name="grows").summary
    assert summary["train_tokens"] == 32 * (3 * 8 + 2 * 16)
    assert {"commit", "hardware"} <= summary["origin"].keys()
    lines = train_lines(run_dir(config, "grows"))
    assert [line["tokens"] // 32 for line in lines] == [8, 16, 24, 40, 56]
    assert all(line["hfu"] > line["mfu"] > 0 for line in lines)


def test_what_a_killed_process_did_for_nothing_is_counted(tmp_path):
    path = ["--config", SMOKE, *TINY, f"run.workdir={tmp_path}"]
    assert main([*path, "run.stop_step=3"]) == 0
    (metrics,) = tmp_path.glob("smoke/*/metrics.jsonl")
    last = json.loads(metrics.read_text().splitlines()[2])
    with open(metrics, "a") as file:  # a line of a step that no checkpoint holds
        file.write(json.dumps({**last, "step": 4, "seconds": last["seconds"] + 100}) + "\n")
    assert main(path) == 0
    (summary,) = tmp_path.glob("smoke/*/summary.json")
    lost_s = json.loads(summary.read_text())["seconds_by_phase"]["lost_to_restart"]
    assert 50 < lost_s < 101


def test_waiting_for_a_step_counts_as_time_of_steps(tmp_path, monkeypatch):
    """Else the steps before a save or an evaluation would look as fast as a read of memory."""
    phases, record = [], loop._Loop._record

    def spied(self, *arguments):
        phases.append(self.clock._stack[-1])
        record(self, *arguments)

    monkeypatch.setattr(loop._Loop, "_record", spied)
    config = apply_overrides(
        load_config(SMOKE),
        [*TINY, f"run.workdir={tmp_path}", "run.eval_every_steps=2", "checkpoint.every_steps=3"],
    )
    train(config, name="run")
    assert len(phases) == 5
    assert set(phases) <= {"step", "compile"}
