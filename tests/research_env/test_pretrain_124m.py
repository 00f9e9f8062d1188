"""The large task, built from token files and shrunk to what cores can do: it runs, scores, and is the same on eight devices as on one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from research_env.diff import emit_diff, make_diff
from research_env.env import AIResearchEnv
from research_env.records import Status
from research_env.sandbox.ladder import probe
from research_env.task import read_task
from research_env.tasks.pretrain_124m import build

SMALL = (
    ("BATCH = 512", "BATCH = 8"),
    ("MICROBATCHES = 4", "MICROBATCHES = 1"),
    ("round(5000 *", "round(4 *"),
    ("num_layers=12", "num_layers=2"),
    ("width=768", "width=64"),
    ("num_heads=12", "num_heads=2"),
    ("num_kv_heads=12", "num_kv_heads=2"),
    ("head_width=64", "head_width=32"),
    ("hidden_width=2048", "hidden_width=128"),
    ("num_warmup_steps=250", "num_warmup_steps=1"),
    ("VOCAB = 512\nROW = 1024", "VOCAB = 512\nROW = 64"),
)


@pytest.fixture
def codebase(tmp_path):
    """A built codebase on 512 kinds of tokens; a run may use rows of 64, the judge scores rows of 1024."""
    rng = np.random.default_rng(0)
    for name, rows in (("train", 40), ("validation", 3), ("final", 2)):
        (np.arange(rows * 1025) % 7 + rng.integers(0, 3, rows * 1025)).astype(np.uint16).tofile(
            tmp_path / name
        )
    argv = [str(tmp_path / "code"), "vocab=512"]
    assert (
        build.main([*argv, *(f"{name}={tmp_path / name}" for name in ("train", "validation", "final"))]) == 0
    )
    return tmp_path / "code"


def small(text):
    for old, new in SMALL:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def test_a_build_locks_what_the_judge_has_and_names_faults(codebase, tmp_path, capsys):
    task = read_task(codebase)
    assert task.has_final
    assert not [path for path in task.baseline if path.startswith(("locked", "final", "data"))]
    assert {"recipe.py", "train.py", "serve.py", "weights.py", "pretrain/step.py"} <= set(task.baseline)
    assert b"VOCAB = 512\n" in task.baseline["recipe.py"]
    assert b"VOCAB = 512\n" in task.private["locked/evaluate.py"]
    small(task.baseline["recipe.py"].decode())
    capsys.readouterr()
    np.zeros(9, np.uint16).tofile(tmp_path / "short")
    np.full(2000, 600, np.uint16).tofile(tmp_path / "large")
    argv = ["vocab=512", f"train={tmp_path / 'large'}", f"validation={tmp_path / 'short'}"]
    assert build.main([str(tmp_path / "new"), *argv]) == 2
    assert build.main([str(codebase), "vocab=x", "train=nowhere"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2 + 4
    assert "holds token 600; vocab=512 ends before it" in errors[0]
    (tmp_path / "odd").write_bytes(b"x" * 4001)
    (tmp_path / "empty").write_bytes(b"")
    argv = ["vocab=512", f"train={tmp_path / 'odd'}", f"validation={tmp_path / 'empty'}"]
    assert build.main([str(tmp_path / "new"), *argv]) == 2
    assert "4001 bytes" in (error := capsys.readouterr().err)
    assert "holds 0 tokens" in error
    argv = [f"{name}={tmp_path / 'train'}" for name in ("train", "validation")]
    assert build.main([str(tmp_path / "new"), "vocab=\u00b2", *argv]) == 2
    assert "must be different files" in (error := capsys.readouterr().err)
    assert "vocab= must be a whole number" in error
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_the_shrunk_task_is_trained_sealed_and_scored_on_both_splits(codebase, tmp_path):
    found = probe("unshare")
    if not found.is_held:
        pytest.skip("unshare does not hold on this host")
    with AIResearchEnv(codebase=str(codebase), workdir=tmp_path / "run", sandbox=found) as env:
        env.cache = None  # the baseline, whose compiles would fill it, is too large to run here
        base = env.task.baseline
        tree = {**base, "recipe.py": small(base["recipe.py"].decode()).encode()}
        candidate = env.add(emit_diff(make_diff(base, tree)))
        (searched,) = env.evaluate([candidate])
        (final,) = env.evaluate_pairs([(candidate, None)], purpose="final", split="final")
    for result in (searched, final):
        assert result.status is Status.OK, result.reason + result.log_tail
        assert 2.0 < result.metric < 7.0  # from the logarithm of 512, 6.24
    assert searched.metric != final.metric
    assert searched.artifact_digest == final.artifact_digest  # trained twice, bit for bit


@pytest.mark.slow
def test_eight_devices_train_what_one_trains(codebase, tmp_path):
    (codebase / "recipe.py").write_text(small((codebase / "recipe.py").read_text()))
    weights = []
    for count in (1, 8):
        out = tmp_path / str(count)
        out.mkdir()
        environment = {
            "OUT": str(out), "DATA": str(codebase / "data"), "SEED": "3", "RUNG": "1.0", "PATH": os.environ["PATH"],
            "JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={count}",
        }  # fmt: skip
        subprocess.run([sys.executable, "train.py"], cwd=codebase, env=environment, check=True)
        weights.append(read(out / "model.safetensors"))
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        # Four steps of AdamW at 6e-4 divide by gradients' own size, so a rounding error in a tiny one is up to a step.
        assert np.mean(np.abs(weights[1][name] - value)) < 1e-5, name


def read(path: Path) -> dict[str, np.ndarray]:
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    return {name: np.frombuffer(body[slice(*entry["data_offsets"])], "<f4") for name, entry in header.items()}
