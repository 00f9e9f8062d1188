"""A run folder of ours is a model too: its config, its tokenizer, its parameters; it can be evaluated, exported, begun with."""

import dataclasses
import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pretrain.checkpoint import Checkpointer, NoCheckpoint
from pretrain.config import ConfigError, load_config, to_json
from pretrain.data.source import MemoryConfig, TextDocument
from pretrain.data.tables import DataConfig
from pretrain.export import main as export_main
from pretrain.hf import HfFolder, Stated, export_model
from pretrain.model.adapters import ADAPTERS, AdapterConfig
from pretrain.model.layers import Rope
from pretrain.model.transformer import LayerKind, ModelConfig, abstract_params
from pretrain.optim import AdamWConfig, Constant, OptimConfig, WarmupCosine
from pretrain.pretrained import Checkpoint, load_init, open_pretrained
from pretrain.rl.grpo import RlConfig
from pretrain.rl.problem import ArithmeticConfig
from pretrain.rl.reward import NumberReward
from pretrain.rl.rollout import RolloutConfig
from pretrain.sharding import MeshConfig, make_mesh
from pretrain.tokenizer import BpeConfig, BytesConfig
from pretrain.train import RunConfig, TrainConfig, train

MODEL = ModelConfig(num_layers=2, width=16, num_heads=2, num_kv_heads=2, head_width=8, hidden_width=16)
WORDS = BpeConfig(vocab_size=280)
ROOT = Path(__file__).parents[2]


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["step", "params", "opt_state", "health"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class State:
    step: jax.Array
    params: dict
    opt_state: dict
    health: dict


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder as training leaves it: (folder, parameters, tokenizer)."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    config = TrainConfig(
        model=MODEL,
        data=DataConfig(
            sources=(MemoryConfig(name="m", documents=(TextDocument(id="a", text="b"),)),),
            tokenizer=WORDS,
            row_length=16,
            batch_rows=8,
        ),
        optim=OptimConfig(method=AdamWConfig(), peak_lr=1e-3, schedule=WarmupCosine(num_warmup_steps=1)),
        run=RunConfig(num_steps=5),
    )
    random = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(random.normal(size=leaf.shape), jnp.float32), abstract_params(MODEL, 280)
    )
    tokenizer = WORDS.build("", lambda n: iter(["once upon a time there was a text " * 9]))
    folder.mkdir()
    tokenizer.save(folder / "tokenizer.json")
    checkpointer = Checkpointer(folder / "checkpoints", to_json(config), "data")
    for step in (3, 5):
        moved = jax.tree.map(lambda x, s=step: x + (5 - s), params)
        state = State(jnp.int32(step), moved, {"count": jnp.int32(step)}, {"accepted": jnp.int32(step)})
        checkpointer.save(state, step)
    checkpointer.close()
    return folder, params, tokenizer


def assert_same_bits(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


def test_the_newest_step_of_a_run_is_its_model(run):
    folder, params, tokenizer = run
    for path in (folder, folder / "checkpoints", folder / "checkpoints" / "5"):
        source = open_pretrained(str(path))
        assert source == Checkpoint(path=str(path))
        assert source.model_config() == MODEL
        assert source.tokenizer().sha256 == tokenizer.sha256
        assert_same_bits(source.params(MODEL), params)
    older = Checkpoint(path=str(folder / "checkpoints" / "3")).params(MODEL)
    assert_same_bits(older, jax.tree.map(lambda x: x + 2, params))


def test_a_policy_that_learned_from_rewards_is_a_model_as_any_other(tmp_path):
    data = RolloutConfig(
        problems=ArithmeticConfig(max_operand=9, num_train=8, num_heldout=4), reward=NumberReward(),
        tokenizer=BytesConfig(), prompts_per_step=1, samples_per_prompt=2, max_prompt_tokens=6, max_new_tokens=3,
    )  # fmt: skip
    config = RlConfig(
        model=MODEL, data=data, init="elsewhere", run=RunConfig(num_steps=5),
        optim=OptimConfig(method=AdamWConfig(), peak_lr=1e-3, schedule=WarmupCosine(num_warmup_steps=1)),
    )  # fmt: skip
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, jnp.float32), abstract_params(MODEL, 260))
    checkpointer = Checkpointer(tmp_path / "checkpoints", to_json(config), "data")
    checkpointer.save(State(jnp.int32(5), params, {"count": jnp.int32(5)}, {"accepted": jnp.int32(5)}), 5)
    checkpointer.close()
    source = open_pretrained(str(tmp_path))
    assert source.tokenizer() == BytesConfig().build("", None)
    assert source.stated().max_length == data.row_length
    assert_same_bits(load_init(str(tmp_path), MODEL, source.tokenizer(), None), params)


def test_init_lays_parameters_out_for_the_mesh(run):
    folder, params, tokenizer = run
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    found = load_init(str(folder / "checkpoints"), MODEL, tokenizer, mesh)
    assert_same_bits(found, params)
    assert len(found["blocks"]["mlp"]["down"].sharding.device_set) == 8


def test_init_by_the_name_of_a_run_refuses_another_tokenizer(run):
    """Of the same size, so that shapes alone would let it pass."""
    folder, params, tokenizer = run
    other = WORDS.build("", lambda n: iter(["quite another text, with other words in it " * 9]))
    assert other.vocab_size == tokenizer.vocab_size
    for path in (folder, folder / "checkpoints"):
        with pytest.raises(ConfigError, match="data.tokenizer must be that of"):
            load_init(str(path), MODEL, other, None)
    # Another rotary base is meant, and goes on.
    turned = dataclasses.replace(MODEL, layer_pattern=(LayerKind(rope=Rope(theta=5e5)),))
    assert_same_bits(load_init(str(folder), turned, tokenizer, None), params)
    with pytest.raises(ConfigError, match="layer_pattern"):
        load_init(Checkpoint(path=str(folder)), turned, tokenizer, None)


def test_the_verb_exports_a_run(run, tmp_path, capsys):
    folder, params, tokenizer = run
    file = tmp_path / "config.py"
    file.write_text(
        "from pretrain.export import ExportConfig\ndef get_config():\n    return ExportConfig()\n"
    )
    where = tmp_path / "folder"
    assert export_main(["--config", str(file), f"model={folder}", f"folder={where}"]) == 0
    source = HfFolder(path=str(where))
    assert_same_bits(source.params(source.model_config()), params)
    assert source.tokenizer().encode("once upon") == tokenizer.encode("once upon")
    # Rows of 16 tokens, each beginning with bos, are what it was trained on: the folder says so to others.
    assert source.tokenizer().adds_bos
    assert source.stated() == Stated(max_length=16, eos_ids=(tokenizer.eos_id,))
    other = tmp_path / "other"
    command = ["--config", str(file), f"model={where}", f"folder={other}", "max_length=99", "bos=false"]
    assert export_main(command) == 0
    assert not HfFolder(path=str(other)).tokenizer().adds_bos
    assert HfFolder(path=str(other)).stated().max_length == 99
    assert load_init(str(where), MODEL, tokenizer, None).keys() == params.keys()
    assert export_main(["--config", str(file), f"model={folder}", f"folder={where}"]) == 2
    assert "not there yet" in capsys.readouterr().err
    assert export_main(["--config", str(file)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2
    assert export_main(["--config", str(file), f"model={tmp_path}/none", f"folder={tmp_path}/x"]) == 3


def test_what_is_no_model_is_refused(run, tmp_path):
    folder, _, _ = run
    with pytest.raises(NoCheckpoint, match="holds none"):
        Checkpoint(path=str(tmp_path)).model_config()
    with pytest.raises(ConfigError, match="num_layers=2 where model.num_layers is 3"):
        Checkpoint(path=str(folder)).params(dataclasses.replace(MODEL, num_layers=3))
    (folder / "tokenizer.json").rename(folder / "gone.json")
    with pytest.raises(ConfigError, match=r"must lie in a run folder that holds the tokenizer.json"):
        Checkpoint(path=str(folder)).tokenizer()
    (folder / "gone.json").rename(folder / "tokenizer.json")


@pytest.mark.slow
def test_a_run_with_adapters_starts_from_another_resumes_and_is_read_as_its_merged_model(tmp_path):
    smoke = load_config(ROOT / "configs/pretrain/smoke.py")
    smoke = dataclasses.replace(
        smoke,
        run=RunConfig(num_steps=4, workdir=str(tmp_path / "base"), writers=()),
        optim=OptimConfig(peak_lr=1e-2, schedule=Constant()),
        sample=dataclasses.replace(smoke.sample, prompts=()),
    )
    base = train(smoke, name="base")
    model = smoke.model.with_adapters(AdapterConfig(rank=2))

    def adapted(workdir, stop_step=None):
        run = RunConfig(num_steps=4, workdir=str(tmp_path / workdir), writers=(), stop_step=stop_step)
        return train(dataclasses.replace(smoke, model=model, init=str(base.folder), run=run), name="adapted")

    whole = adapted("whole")
    adapted("parts", stop_step=3)
    parts = adapted("parts")
    assert parts.summary["params_sha256"] == whole.summary["params_sha256"]
    assert whole.summary["params"] > base.summary["params"]

    source, before = Checkpoint(path=str(whole.folder)), Checkpoint(path=str(base.folder))
    assert source.model_config() == smoke.model
    merged, old = source.params(smoke.model), before.params(smoke.model)
    assert ADAPTERS not in merged["blocks"]
    assert_same_bits(merged["embed"], old["embed"])
    difference = np.asarray(merged["blocks"]["mlp"]["down"] - old["blocks"]["mlp"]["down"])
    assert [np.linalg.matrix_rank(layer, tol=1e-5) for layer in difference] == [2, 2]
    on_mesh = source.params(smoke.model, make_mesh(MeshConfig(fsdp=4, tensor=1, replica=2)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), on_mesh, merged)
    folder = export_model(tmp_path / "folder", merged, smoke.model, source.tokenizer())
    assert_same_bits(HfFolder(path=str(folder)).params(smoke.model), merged)
    # What a run with adapters left is a beginning for others like any model.
    assert_same_bits(load_init(str(whole.folder), smoke.model, source.tokenizer(), None), merged)


@pytest.mark.parametrize(
    ("verb", "config", "override", "code", "said"),
    [
        ("export", "export/folder", "folder=x", 2, "model must be set"),
        ("sample", "sample/quickstart", "model=nowhere", 3, "holds none"),
    ],
)
def test_as_a_command_a_verb_knows_its_config(tmp_path, verb, config, override, code, said):
    """Run as a script a module has classes of its own, which a config does not return."""
    command = [sys.executable, "-m", f"pretrain.{verb}", "--config", ROOT / f"configs/{config}.py", override]
    ended = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert ended.returncode == code, ended.stderr
    assert said in ended.stderr
    assert list(tmp_path.iterdir()) == []
