"""The verb scores a folder from config to table, goes on where it was killed, and refuses bad input in one line."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pretrain.config import ConfigError
from pretrain.evals.tasks import Lambada, OpenQuestions, Options, Passages
from pretrain.evaluate import EvaluateConfig, evaluate, main
from pretrain.hf import export_model
from pretrain.model.transformer import ModelConfig, abstract_params
from pretrain.tokenizer import ByteTokenizer

MODEL = ModelConfig(
    num_layers=1, width=16, num_heads=2, num_kv_heads=1, head_width=8, hidden_width=16, dtype="float32"
)
TASKS = (
    Options(name="options", file="options.json"),
    Lambada(file="words.jsonl"),
    Passages(name="passages", file="words.jsonl"),
)


def make_folder(path, seed, **options):
    random = np.random.default_rng(seed)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(random.normal(size=leaf.shape) * 0.3, jnp.float32),
        abstract_params(MODEL, 260),
    )
    return str(export_model(path, params, MODEL, ByteTokenizer(), **options))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("evaluate")
    options = [
        {
            "instruction": f"Choose: Which {i}?\n\nAnswer1: one{i} Answer2: two\n\nAnswer format: x",
            "answer": f"answer{1 + i % 2}",
        }
        for i in range(6)
    ]
    (root / "options.json").write_text(json.dumps(options))
    (root / "words.jsonl").write_text(
        "".join(json.dumps({"text": f"some words here {i}"}) + "\n" for i in range(5))
    )
    make_folder(root / "model", 0)
    make_folder(root / "base", 1)
    return root


@pytest.fixture
def config(root, tmp_path):
    return EvaluateConfig(
        model=str(root / "model"),
        tasks=TASKS,
        data_root=str(root),
        row_length=64,
        batch_rows=8,
        workdir=str(tmp_path),
    )


def results_of(config, name="test"):
    return evaluate(config, name=name)["tasks"]


def test_every_kind_of_task_gets_its_metrics_with_intervals(config, capsys):
    tasks = results_of(config)
    assert list(tasks["options"]["metrics"]) == ["accuracy", "accuracy_per_character"]
    assert list(tasks["lambada"]["metrics"]) == ["accuracy", "nats_per_word"]
    bits = tasks["passages"]["metrics"]["bits_per_byte"]
    assert bits["low"] <= bits["value"] <= bits["high"]
    assert bits["items"] == 5
    table = capsys.readouterr().out
    assert f"{bits['value']:.4f}" in table
    assert "options v1" in table


def test_the_same_command_takes_what_is_there_and_computes_what_is_not(config, tmp_path):
    first = results_of(config)
    (folder,) = [p for p in (tmp_path / "test").glob("*/*") if p.is_dir()]
    stored = folder / "options.json"
    marked = json.loads(stored.read_text())
    marked["records"][0]["metrics"]["accuracy"] = 1 - marked["records"][0]["metrics"]["accuracy"]
    stored.write_text(json.dumps(marked))
    (folder / "lambada.json").unlink()
    second = results_of(config)
    assert second["options"]["metrics"] != first["options"]["metrics"]  # read, not computed
    assert second["lambada"] == first["lambada"]
    only = evaluate(EvaluateConfig(**{**vars(config), "only": ("passages",)}), name="test")
    assert list(only["tasks"]) == ["passages"]


def test_records_of_other_items_prompts_or_another_tokenizer_are_computed_anew(
    config, root, tmp_path, capsys
):
    """Under the same path, with the same ids: the text of the items, the examples, the tokenizer of the model."""
    data, model = tmp_path / "data", tmp_path / "model"
    shutil.copytree(root, data)
    shutil.copytree(root / "model", model)
    task = Options(name="options", file="options.json", examples_file="shots.json")
    options = json.loads((data / "options.json").read_text())
    (data / "shots.json").write_text(json.dumps(options))
    changed = {"model": str(model), "tasks": (task,), "data_root": str(data), "num_shots": 1}
    config = EvaluateConfig(**{**vars(config), **changed, "row_length": 128})
    (logprobs,) = {str(_stored(config, tmp_path)) for _ in range(2)}
    assert "scored anew" not in capsys.readouterr().err

    def swap(v):
        v["model"]["vocab"].update({"n": ord("w"), "w": ord("n")})

    for change in (
        lambda: (data / "options.json").write_text(json.dumps(options).replace("two", "six")),
        lambda: (data / "shots.json").write_text(json.dumps(options).replace("Which", "What")),
        lambda: edit(model / "tokenizer.json", swap),
    ):
        change()
        before, logprobs = logprobs, str(_stored(config, tmp_path))
        assert logprobs != before
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "scored anew" in line]
        assert line.startswith("options: ")


def _stored(config, workdir):
    evaluate(config, name="stored")
    (path,) = (workdir / "stored").glob("*/*/options.json")
    return json.loads(path.read_text())["records"]


def edit(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_a_base_is_compared_item_by_item(config, root):
    same = results_of(EvaluateConfig(**{**vars(config), "base": config.model}))
    for task in same.values():
        for change in task["change"].values():
            assert (change["value"], change["low"], change["high"]) == (0.0, 0.0, 0.0)
    other = results_of(EvaluateConfig(**{**vars(config), "base": str(root / "base")}))["passages"]
    change = other["change"]["bits_per_byte"]
    assert change["value"] == pytest.approx(
        other["metrics"]["bits_per_byte"]["value"] - other["base"]["bits_per_byte"]["value"]
    )
    assert change["low"] < change["value"] < change["high"]


def test_a_base_reads_the_texts_that_the_model_reads(config, root):
    """Two folders of the same weights, one asking for bos: without a common rule they would differ."""
    make_folder(root / "asks", 0, add_bos=True)
    pair = {"model": str(root / "asks"), "base": str(root / "model"), "tasks": TASKS[:2]}
    found = {}
    for bos in (None, True, False):
        found[bos] = evaluate(EvaluateConfig(**{**vars(config), **pair, "bos": bos}), name="test")
        change = found[bos]["tasks"]["lambada"]["change"]["nats_per_word"]
        assert (change["value"], change["low"], change["high"]) == (0.0, 0.0, 0.0)
        assert found[bos]["bos"] == (bos is not False)
    values = {bos: r["tasks"]["lambada"]["metrics"]["nats_per_word"]["value"] for bos, r in found.items()}
    assert values[None] == values[True] != values[False]


def test_bad_input_is_exit_code_two_and_one_line_each(root, tmp_path, capsys):
    file = tmp_path / "config.py"

    def run(body, *overrides):
        file.write_text(
            "from pretrain.evaluate import EvaluateConfig\nfrom pretrain.evals.tasks import *\n"
            f"def get_config():\n    return {body}\n"
        )
        code = main(["--config", str(file), f"workdir={tmp_path}/runs", *overrides])
        return code, capsys.readouterr().err.splitlines()

    model = repr(str(root / "model"))
    code, lines = run(f"EvaluateConfig(model={model}, tasks=(PIQA,))", f"data_root={root}")
    assert (code, len(lines)) == (2, 1)
    assert "piqa" in lines[0]
    assert not (tmp_path / "runs").exists()
    code, lines = run(f"EvaluateConfig(model={model}, tasks=())")
    assert code == 2
    assert "tasks must name at least one task" in lines[0]
    words = "Lambada(file='words.jsonl')"
    code, lines = run(f"EvaluateConfig(model='{root}/nothing', tasks=({words},))", f"data_root={root}")
    assert code == 3
    code, lines = run(
        f"EvaluateConfig(model={model}, tasks=({words},), row_length=4, batch_rows=8)", f"data_root={root}"
    )
    assert code == 2
    assert "must fit row_length=4" in lines[0]
    code, lines = run(f"EvaluateConfig(model={model}, tasks=({words},), num_shots=2)", f"data_root={root}")
    assert code == 2
    assert "solved examples" in lines[0]


def test_one_item_has_no_interval(config, capsys):
    one = results_of(EvaluateConfig(**{**vars(config), "max_items": 1, "base": config.model}))
    bits = one["passages"]["metrics"]["bits_per_byte"]
    assert (bits["low"], bits["high"], bits["items"]) == (None, None, 1)
    assert "[no interval]  n=1" in capsys.readouterr().out


def test_items_that_stand_in_a_corpus_are_counted_before_any_score(config, tmp_path, capsys):
    (tmp_path / "seen.jsonl").write_text(
        json.dumps({"text": "one two three four five six seven eight nine"})
        + "\n"
        + json.dumps({"text": "short"})
        + "\n"
    )
    (tmp_path / "corpus.jsonl").write_text(
        '{"text": "nothing"}\n{"id": "it", "text": "zero, One two three four five six seven EIGHT nine!"}\n{"words": 1}\n'
    )
    task = Passages(name="seen", file="seen.jsonl")
    changed = {"tasks": (task,), "data_root": str(tmp_path), "corpus": "corpus.jsonl"}
    found = results_of(EvaluateConfig(**{**vars(config), **changed}))["seen"]["contamination"]
    assert found == {"items": 2, "too_short": 1, "found": {"0": "it"}}
    out = capsys.readouterr().out
    assert "corpus corpus.jsonl: 2 texts, 1 records without one" in out
    assert out.index("1 of 1 items stand in the corpus; 1 are too short to tell") < out.index("bits_per_byte")
    for corpus, said in (("none.jsonl", "which is not there"), ("seen.txt", "got none in seen.txt")):
        (tmp_path / "seen.txt").write_text('{"words": 1}\n')
        with pytest.raises(ConfigError, match=said):
            evaluate(EvaluateConfig(**{**vars(config), **changed, "corpus": corpus}), name="refused")
    assert not (tmp_path / "refused").exists()


def test_faults_of_a_config_come_together():
    with pytest.raises(ConfigError) as caught:
        EvaluateConfig(model="m", tasks=(TASKS[0], TASKS[0]), only=("x",), row_length=1, max_items=0)
    assert len(caught.value.faults) == 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judged(OpenQuestions):
    """Questions whose answers are judged together."""

    def judge(self, root, answers):
        return {"letters": float(sum(map(len, answers.values()))), "asked": float(len(answers))}


@pytest.mark.slow
def test_a_task_may_judge_all_answers_together(config, root):
    (root / "questions.jsonl").write_text('{"q": "what", "a": ["x"]}\n{"q": "who?", "a": ["y"]}\n')
    task = Judged(name="open", file="questions.jsonl", question_key="q", answers_key="a")
    changed = {**vars(config), "tasks": (task,), "max_new_tokens": 4, "base": str(root / "base")}
    found = results_of(EvaluateConfig(**changed))["open"]
    assert list(found["metrics"]) == list(found["change"]) == ["exact_match", "letters", "asked"]
    assert found["metrics"]["asked"] == {"value": 2.0, "low": None, "high": None, "items": 2}
    assert found["change"]["letters"]["value"] == (
        found["metrics"]["letters"]["value"] - found["base"]["letters"]["value"]
    )


@pytest.mark.slow
def test_open_questions_are_answered_by_the_generator(config, root):
    (root / "questions.jsonl").write_text('{"q": "what", "a": ["x"]}\n{"q": "who?", "a": ["y"]}\n')
    task = OpenQuestions(name="open", file="questions.jsonl", question_key="q", answers_key="a")
    changed = {**vars(config), "tasks": (task,), "max_new_tokens": 4}
    assert list(results_of(EvaluateConfig(**changed))["open"]["metrics"]) == ["exact_match"]
