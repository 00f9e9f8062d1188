"""The driver for Ray: one process on each of two nodes, which find each other and train one run."""

import importlib.util
import json
import os
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the [ray] extra"),
    # Ray forks its servers and replaces them at once (exec); jax warns of any fork once another file has used it.
    pytest.mark.filterwarnings(r"ignore:os\.fork\(\) was called:RuntimeWarning"),
    # Ray's own: files of its servers are closed when they end.
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:.*RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO:FutureWarning"),
]
ROOT = Path(__file__).parents[2]


def test_two_nodes_train_one_run(tmp_path, monkeypatch):
    """A cluster of two nodes on this machine, of one CPU each, so that each process lands on its own."""
    import ray
    from ray.cluster_utils import Cluster

    from tools.ray_pod import run_once

    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        ray.init(address=cluster.address)
        arguments = [
            "--config", str(ROOT / "configs/pretrain/smoke.py"), f"run.workdir={tmp_path}", "run.num_steps=3",
            "model.num_layers=1", "data.batch_rows=8", "data.row_length=32", "run.eval_every_steps=none", "run.writers=()",
            "optim.schedule.num_warmup_steps=1",
        ]  # fmt: skip
        assert run_once(2, {}, arguments) == 0
    finally:
        ray.shutdown()
        cluster.shutdown()
    (summary,) = tmp_path.glob("smoke/*/summary.json")
    summary = json.loads(summary.read_text())
    assert summary["steps"] == 3
    assert summary["device"].startswith("4 x ")
