"""lm-evaluation-harness gets from our model what our own evaluation gets, on the same items."""

import importlib
import json
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pretrain.evals.likelihood import continuation_scores, window_rows
from pretrain.evals.tasks import NATURAL_QUESTIONS, Lambada, LastWord, Options, Winogrande
from pretrain.evaluate import EvaluateConfig, evaluate
from pretrain.hf import export_model
from pretrain.model.transformer import ModelConfig, abstract_params
from pretrain.tokenizer import ByteTokenizer

pytestmark = pytest.mark.slow
pytest.importorskip("lm_eval", reason="the [harness] extra is not installed")
bridge = importlib.import_module("pretrain.lm_eval_bridge")
lm_eval_utils = importlib.import_module("lm_eval.utils")

MODEL = ModelConfig(
    num_layers=1, width=16, num_heads=2, num_kv_heads=1, head_width=8, hidden_width=16, dtype="float32"
)
TASKS = (
    Options(name="options", file="options.json"),
    Winogrande(file="blanks.json"),
    Lambada(file="words.jsonl"),
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("harness")
    random = np.random.default_rng(0)
    words = "red green blue round square loud quiet near far".split()

    def pick(n):
        return [str(w) for w in random.choice(words, n, replace=False)]

    options = [
        {
            "instruction": f"Choose: Is it {a} or {b}?\n\nAnswer1: {a} and {c} Answer2: {b}\n\nAnswer format: x",
            "answer": f"answer{1 + i % 2}",
        }
        for i, (a, b, c) in enumerate(pick(3) for _ in range(12))
    ]
    (root / "options.json").write_text(json.dumps(options))
    blanks = [
        {
            "instruction": f"Fill: The _ one is {c}.\n\nOption1: {a} Option2: {b} Answer format: x",
            "answer": f"option{1 + i % 2}",
        }
        for i, (a, b, c) in enumerate(pick(3) for _ in range(12))
    ]
    (root / "blanks.json").write_text(json.dumps(blanks))
    (root / "words.jsonl").write_text(
        "".join(json.dumps({"text": " ".join(pick(4))}) + "\n" for _ in range(6))
    )
    params = jax.tree.map(
        lambda leaf: jnp.asarray(random.normal(size=leaf.shape) * 0.3, jnp.float32),
        abstract_params(MODEL, 260),
    )
    export_model(root / "model", params, MODEL, ByteTokenizer())
    return root


def test_the_harness_finds_the_same_accuracies(root, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    shared = {"model": str(root / "model"), "tasks": TASKS, "data_root": str(root), "row_length": 128, "workdir": str(tmp_path)}  # fmt: skip
    ours = evaluate(EvaluateConfig(**shared), name="ours")["tasks"]
    asked = set()

    def spied(scorer, words, pairs, add_bos):
        asked.update(pairs)
        return continuation_scores(scorer, words, pairs, add_bos)

    monkeypatch.setattr(bridge, "continuation_scores", spied)
    theirs = bridge.LmEvalConfig(**shared).run(name="theirs")["results"]
    for task in TASKS:
        metrics = theirs[f"local_{task.name}"]
        assert metrics["acc,none"] == pytest.approx(ours[task.name]["metrics"]["accuracy"]["value"])
    per_character = ours["options"]["metrics"]["accuracy_per_character"]["value"]
    assert theirs["local_options"]["acc_norm,none"] == pytest.approx(per_character)
    # A random model gets no last word right however it is asked.
    assert asked == {pair for task in TASKS for item in task.items(str(root)) for pair in _pairs(item)}


@hypothesis.given(ids=st.lists(st.integers(0, 99), max_size=40), length=st.integers(1, 12))
def test_long_texts_are_read_in_the_windows_of_the_harness(ids, length):
    theirs = lm_eval_utils.get_rolling_token_windows(ids, 100, length, context_len=1)
    theirs = [lm_eval_utils.make_disjoint_window(pair) for pair in theirs]
    ours = window_rows(ids, 100, length)
    assert [(row[:start], row[start:]) for row, start in ours] == theirs


def test_the_prompt_of_nq_open_is_that_of_the_harness():
    (path,) = Path(lm_eval_utils.__file__).parent.glob("tasks/nq_open/nq_open.yaml")
    text = path.read_text()
    assert json.dumps(NATURAL_QUESTIONS.description) in text
    assert json.dumps(NATURAL_QUESTIONS.form.replace("{}", "{{question}}")) in text
    until = text.partition("until:")[2].partition("do_sample")[0]
    assert NATURAL_QUESTIONS.stop == tuple(
        json.loads(line.strip(" -")) for line in until.split("\n") if line.strip()
    )


def _pairs(item):
    if isinstance(item, LastWord):
        return [(item.context, item.word)]
    return list(zip(item.contexts, item.continuations, strict=True))
