"""Every file in configs/ builds, survives JSON and keeps one fingerprint."""

import ast
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.config import (
    ConfigError,
    apply_overrides,
    diff,
    fingerprint,
    from_json,
    load_config,
    to_json,
)

ROOT = Path(__file__).parent.parent
FILES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.py"))
NAMES = {Path(file).name for file in FILES}

# A config that names one of these needs an optional package, hence an extra.
BRIDGES = {
    "pretrain.seqio_bridge": "seqio",
    "pretrain.jobs.on_ray": "ray",
    "pretrain.jobs.on_slurm": "submitit",
    "pretrain.wandb_sink": "wandb",
    "pretrain.data.hf_source": "datasets",
    "pretrain.data.parquet_source": "pyarrow",
    "pretrain.gguf_import": "gguf",
    "pretrain.lm_eval_bridge": "lm_eval",
    "synth.llm.endpoint": "openai",
}


def missing_package(file):
    """The optional package that `file` names and that is not installed, if there is one."""
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.ImportFrom):
            names = {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names = {alias.name for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in NAMES:
            beside = (ROOT / file).with_name(node.value)  # a config may build on another
            if beside.is_file() and beside != ROOT / file and missing_package(beside):
                return missing_package(beside)
            continue
        else:
            continue
        for name in names & BRIDGES.keys():
            if importlib.util.find_spec(BRIDGES[name]) is None:
                return BRIDGES[name]
    return None


@pytest.fixture(params=FILES)
def config(request):
    package = missing_package(request.param)
    if package:
        pytest.skip(f"{request.param} names an optional package that is not installed: {package}")
    return load_config(ROOT / request.param)


def test_the_recipes_that_people_are_told_to_run_are_there():
    named = {"smoke", "quickstart", "corpus_cpu", "llama_125m", "llama_1b"}
    assert {f"configs/pretrain/{name}.py" for name in named} <= set(FILES)


def test_a_config_survives_json(config):
    text = json.dumps(to_json(config), allow_nan=False)
    restored = from_json(json.loads(text))
    assert restored == config
    assert fingerprint(restored) == fingerprint(config)
    assert diff(config, restored) == []


@pytest.mark.parametrize("file", [f for f in FILES if f.startswith("configs/pretrain/")])
def test_overrides_change_the_identity_and_local_ones_do_not(file):
    if package := missing_package(file):
        pytest.skip(f"{file} names an optional package that is not installed: {package}")
    config = load_config(ROOT / file)
    local = apply_overrides(config, ["run.workdir=/elsewhere", "run.stop_step=3", "data.root=/corpora"])
    assert local != config
    assert fingerprint(local) == fingerprint(config)
    overrides = ["run.num_steps=7", "run.seed=12345", "optim.peak_lr=0.0123"]
    changed = [fingerprint(apply_overrides(config, [override])) for override in overrides]
    assert len({fingerprint(config), *changed}) == 4
    assert [path for path, _, _ in diff(config, apply_overrides(config, overrides))] == [
        "optim.peak_lr",
        "run.num_steps",
        "run.seed",
    ]


def test_fingerprints_are_the_same_in_another_process():
    """Another hash seed reorders sets and salts `hash`: neither may reach a fingerprint."""
    files = [file for file in FILES if not missing_package(file)]
    program = (
        "import sys; from pretrain.config import fingerprint, load_config\n"
        "for file in sys.argv[1:]: print(fingerprint(load_config(file)))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "4711", "PYTHONPATH": str(ROOT)}
    output = subprocess.run(
        [sys.executable, "-c", program, *files],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert output.stdout.split() == [fingerprint(load_config(ROOT / file)) for file in files]


@pytest.mark.parametrize(
    ("override", "rule"),
    [
        ("model.num_layers=0", "model.num_layers must be positive"),
        ("model.head_width=15", "model.head_width must be even"),
        ("data.row_length=0", "data.row_length must be at least 2"),
        ("optim.peak_lr=-1", "optim.peak_lr must be positive"),
        ("optim.clip_norm=0", "optim.clip_norm must be positive"),
        ("optim.method.b1=2", "optim.method.b1 must lie in [0, 1)"),
        ("optim.schedule.num_warmup_steps=-1", "optim.schedule.num_warmup_steps must be a count"),
        ("loss.z_weight=-1", "loss.z_weight must be at least 0"),
        ("loss.chunk_tokens=0", "loss.chunk_tokens must be positive"),
        ("health.num_sigmas=0", "health.num_sigmas must be positive"),
        ("run.num_steps=0", "run.num_steps must be at least 1"),
        ("sample.temperature=-1", "sample.temperature must be at least 0"),
        ("sample.max_new_tokens=0", "sample.max_new_tokens must be at least 1"),
    ],
)
def test_a_refusal_names_the_field_as_it_was_typed(override, rule):
    config = load_config(ROOT / "configs/pretrain/smoke.py")
    with pytest.raises(ConfigError) as refused:
        apply_overrides(config, [override])
    (fault,) = refused.value.faults
    assert fault.startswith(rule)
