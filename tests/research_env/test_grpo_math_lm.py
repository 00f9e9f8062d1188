"""GRPO on a language model as a codebase: one set of files for a tiny model on sums and for the paper's model on MATH."""

import dataclasses
import functools
import importlib
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from pretrain.hf import HfFolder, export_model
from pretrain.model.transformer import ModelConfig, abstract_params, init_params
from pretrain.optim import make_optimizer
from pretrain.rl.policy_loss import SampleBatch
from pretrain.rl.problem import ArithmeticConfig
from pretrain.step import abstract_state, make_train_step
from pretrain.tokenizer import BytesConfig
from research_env.diff import emit_diff, make_diff
from research_env.env import AIResearchEnv
from research_env.records import Status
from research_env.task import read_task
from research_env.tasks.grpo_math_lm import build

MODEL = ModelConfig(
    num_layers=1, width=32, num_heads=2, num_kv_heads=1, head_width=16, hidden_width=64, qk_norm=False, qkv_bias=True,
    tied_head=True, dtype="float32",
)  # fmt: skip
# The published config.json of Qwen2.5-Math-1.5B, as far as it decides shapes and mathematics.
QWEN = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "hidden_size": 1536,
    "intermediate_size": 8960, "max_position_embeddings": 4096, "num_attention_heads": 12, "num_hidden_layers": 28,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 10000, "tie_word_embeddings": True,
    "use_sliding_window": False, "sliding_window": 4096, "vocab_size": 151936,
}  # fmt: skip
QWEN_PARAMS = 1_543_714_304  # as its weights count


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    """A tiny model of the paper's family that has read nothing."""
    tokenizer = BytesConfig().build("", lambda max_bytes: iter(()))
    params = init_params(MODEL, tokenizer.vocab_size, seed=0)
    return export_model(tmp_path_factory.mktemp("model") / "tiny", params, MODEL, tokenizer)


@pytest.fixture(scope="module")
def codebase(model_folder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("code")
    sums = ArithmeticConfig(max_operand=9, num_train=60, num_heldout=16)
    for name, problems in (
        ("train", sums.train()),
        ("heldout", sums.heldout()[:8]),
        ("final", sums.heldout()[8:]),
    ):
        lines = [json.dumps({"problem": p.prompt, "answer": p.answer}) + "\n" for p in problems]
        (folder / name).write_text("".join(lines))
    words = [f"{name}={folder / name}" for name in ("train", "heldout", "final")]
    assert build.main([str(folder / "code"), f"model={model_folder}", *words, *SMALL]) == 0
    return folder / "code"


SMALL = (
    "template={question}", "place=whole", "heldout_problems=8", "practice_problems=4", "max_prompt_tokens=8",
    "max_new_tokens=3", "dtype=float32", "prompts=4", "samples=4", "microbatches=1", "slots=16", "learning_rate=1e-3",
)  # fmt: skip


def test_the_judge_has_a_sampler_of_its_own_and_the_run_no_heldout_problem(codebase):
    task = read_task(codebase)
    assert task.has_final
    assert not [path for path in task.baseline if path.startswith(("locked", "final", "data"))]
    assert {"recipe.py", "train.py", "settings.json", "pretrain/rl/rollout.py"} <= set(task.baseline)
    for path in ("pretrain/generate.py", "pretrain/rl/expression.py", "settings.json"):
        assert task.private[f"locked/{path}"] == task.baseline[path]
    assert [task.policy.refusal(path) is None for path in ("recipe.py", "train.py", "pretrain/step.py")] == [
        True
    ] * 3
    for path in ("settings.json", "locked/evaluate.py", "locked/pretrain/generate.py", "data/train.jsonl"):
        assert task.policy.refusal(path) is not None, path
    seen = (codebase / "data/train.jsonl").read_text() + (codebase / "data/practice.jsonl").read_text()
    hidden = [
        json.loads(line)["question"] for line in (codebase / "locked/heldout.jsonl").read_text().splitlines()
    ]
    assert len(hidden) == 8
    assert not [question for question in hidden if json.dumps(question) in seen]
    assert not list((codebase / "locked").rglob("*.safetensors")), (
        "the judge reads the artifact's weights alone"
    )
    assert b"PROMPTS = 4 " in task.baseline["recipe.py"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["place=here"], "place must be one of"),
        (["template=no"], "template= must hold {question}"),
        (["heldout={train}"], "no question may be in two parts"),
        (["heldout_problems=9"], "at least 9 problems"),
        (["practice_problems=60"], "more than practice_problems=60"),
        (["max_prompt_tokens=2"], "of at most max_prompt_tokens=2 tokens, got 0"),
        (["prompts=0", "learning_rate=x", "dtype=int8", "colour=red"], "prompts= must be a positive whole number"),
        (["model={train}"], "checkpoint"),
    ],
)  # fmt: skip
def test_a_build_that_cannot_be_names_its_faults_and_leaves_nothing(
    codebase, model_folder, tmp_path, capsys, changes, words
):
    folder = codebase.parent
    files = [f"{name}={folder / name}" for name in ("train", "heldout", "final")]
    changes = [change.replace("{train}", str(folder / "train")) for change in changes]
    assert build.main([str(tmp_path / "new"), f"model={model_folder}", *files, *SMALL, *changes]) == 2
    errors = capsys.readouterr().err
    assert words in errors
    assert len(errors.splitlines()) == len(changes)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def train(codebase, monkeypatch):
    """The codebase's train.py as it stands before any change, on its own recipe."""
    monkeypatch.chdir(codebase)
    monkeypatch.syspath_prepend(codebase)
    monkeypatch.delenv("RUNG", raising=False)
    for name in ("recipe", "train"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module("train")
    for name in ("recipe", "train"):
        sys.modules.pop(name, None)


def test_the_papers_model_has_its_shapes_and_its_step_can_be_traced(codebase, train, tmp_path):
    """No weights: what 20 steps on 64 problems of 8 samples with 1,536 tokens would compile, as far as shapes go."""
    start = tmp_path / "start"
    start.mkdir()
    for path in (codebase / "data/start").glob("*.json"):
        (start / path.name).write_text(path.read_text())
    (start / "config.json").write_text(json.dumps(QWEN))
    model = dataclasses.replace(HfFolder(path=str(start)).model_config(), dtype="bfloat16", remat="full")
    shapes = abstract_params(model, QWEN["vocab_size"])
    assert sum(int(np.prod(s.shape)) for s in jax.tree.leaves(shapes)) == QWEN_PARAMS
    optimizer = make_optimizer(train.recipe.OPTIM, 20, shapes, model)
    B, T = 64 * 8, 512 + 1024
    row, number = functools.partial(jax.ShapeDtypeStruct, dtype=np.float32), np.int32
    batch = SampleBatch(
        **{name: jax.ShapeDtypeStruct((B, T + 1), number) for name in ("tokens_BT1", "segment_ids_BT1", "positions_BT1")},
        **{name: row((B, T)) for name in ("weights_BT", "behavior_BT", "reference_BT")},
        **{name: row((B,)) for name in ("share_B", "advantage_B")},
    )  # fmt: skip
    config = train.config(str(codebase / "data"), seed=2**40)
    loss = dataclasses.replace(config, model=model).objective().loss
    state = abstract_state(model, QWEN["vocab_size"], optimizer, None, config.health)
    step = make_train_step(loss, optimizer, num_microbatches=64, health=config.health)
    after, metrics = step.trace(state, batch).out_info
    assert jax.tree.map(lambda s: (s.shape, s.dtype), after) == jax.tree.map(
        lambda s: (s.shape, s.dtype), state
    )
    assert metrics["loss"].shape == ()


@pytest.mark.slow
def test_the_tiny_model_is_trained_sealed_and_judged_by_locked_code(codebase, isolation, tmp_path):
    with AIResearchEnv(codebase=str(codebase), workdir=tmp_path / "run", sandbox=isolation) as env:
        base = env.task.baseline
        reward = base["pretrain/rl/reward.py"].decode()
        cheat = reward.replace("        answer = _PLACES[self.place](text)\n", "        return 1.0\n")
        assert cheat != reward  # what a candidate does to the checker is done to its own copy
        diff = emit_diff(make_diff(base, {**base, "pretrain/rl/reward.py": cheat.encode()}))
        results = [env.value(diff, rung=0.05) for diff in ("", diff)]
    for result in results:
        assert result.status is Status.OK, result.reason + result.log_tail
    assert "step 0 loss" in results[0].log_tail
    assert "reward 1.0000" in results[1].log_tail
    assert results[1].metric < 0.5
