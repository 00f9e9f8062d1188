"""seqio tasks as documents and SentencePiece models as tokenizers: needs the `[seqio]` extra."""

import io
import pickle

import pytest

seqio = pytest.importorskip("seqio", reason="the [seqio] extra is not installed")

import numpy as np  # noqa: E402
import sentencepiece  # noqa: E402
import tensorflow as tf  # noqa: E402

from pretrain.config import ConfigError  # noqa: E402
from pretrain.data.source import TextDocument  # noqa: E402
from pretrain.data.tables import DataConfig, prepare_tables  # noqa: E402
from pretrain.evals.tasks import Choice, Judge, LastWord, Passage, Question, few_shot_prefix  # noqa: E402
from pretrain.evaluate import EvaluateConfig, evaluate  # noqa: E402
from pretrain.hf import export_model  # noqa: E402
from pretrain.model.transformer import ModelConfig, init_params  # noqa: E402
from pretrain.seqio_bridge import SentencePieceConfig, SeqioConfig, SeqioTask  # noqa: E402
from pretrain.tokenizer import BytesConfig, ByteTokenizer  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    # TensorFlow and what it loads warn about each other.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

TEXTS = [f"the {i} quick brown foxes jump over {i * 7} lazy dogs\n" for i in range(200)]


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_writer=model,
        vocab_size=320,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("sp") / "model.model"
    path.write_bytes(model.getvalue())
    return path


def test_a_sentencepiece_tokenizer_gives_text_back_and_has_four_special_ids(model_file):
    tokenizer = SentencePieceConfig(path=str(model_file), require_lossless=False).build(
        "", lambda n: iter(())
    )
    for text in (*TEXTS[:5], "naïve 你好 \U0001f680", "two  blanks ", "<s></s><pad>"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not set(ids) & {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.sep_id}
        # The blank that SentencePiece puts in front is no byte of the text.
        assert sum(map(tokenizer.token_bytes, ids)) == len(text.encode()) + 1
    assert len({tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.sep_id}) == 4
    assert max(tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.sep_id) < tokenizer.vocab_size
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])
    assert copy.sha256 == tokenizer.sha256


def test_a_tokenizer_that_changes_text_is_refused_unless_allowed(model_file):
    with pytest.raises(ConfigError, match="must give back the text it was given"):
        SentencePieceConfig(path=str(model_file)).build("", lambda n: iter(()))


def test_a_file_that_is_no_model_is_refused(tmp_path):
    (tmp_path / "x.model").write_bytes(b"not a model")
    with pytest.raises(ConfigError, match="must be a SentencePiece model"):
        SentencePieceConfig(path="x.model").build(str(tmp_path), lambda n: iter(()))


@pytest.fixture(scope="module")
def tasks(model_file):
    def examples(split, shuffle_files=False, seed=None):
        return tf.data.Dataset.from_tensor_slices({"question": [t[:9] for t in TEXTS], "targets": TEXTS})

    features = {"targets": seqio.Feature(seqio.SentencePieceVocabulary(str(model_file)), add_eos=False)}
    source = seqio.FunctionDataSource(examples, splits=["train"], num_input_examples={"train": len(TEXTS)})
    seqio.TaskRegistry.add(
        "bridge_text", source=source, preprocessors=[seqio.preprocessors.tokenize], output_features=features
    )
    seqio.TaskRegistry.add(
        "bridge_ids",
        source=source,
        preprocessors=[lambda ds: seqio.preprocessors.tokenize(ds, features, copy_pretokenized=False)],
        output_features=features,
    )
    seqio.MixtureRegistry.add("bridge_mixture", [("bridge_text", 1.0)])
    yield
    seqio.MixtureRegistry.remove("bridge_mixture")
    for name in ("bridge_text", "bridge_ids"):
        seqio.TaskRegistry.remove(name)


@pytest.mark.parametrize("task", ["bridge_text", "bridge_ids", "bridge_mixture"])
def test_a_task_or_mixture_yields_its_texts(tasks, task):
    documents = list(SeqioConfig(name="q", task=task).build("").documents())
    assert sorted(d.text for d in documents) == sorted(TEXTS)
    assert len({d.id for d in documents}) == len(TEXTS)


def test_features_make_pairs(tasks):
    config = SeqioConfig(name="q", task="bridge_text", first_feature="question")
    document = next(iter(config.build("").documents()))
    assert document == TextDocument("bridge_text/train:0", TEXTS[0], "q", TEXTS[0][:9])


def test_an_unknown_task_or_split_is_refused(tasks):
    with pytest.raises(ConfigError, match="must be a registered seqio task or mixture, got 'bridge_txt'"):
        SeqioConfig(name="q", task="bridge_txt").build("")
    with pytest.raises(ConfigError, match="split must be one of train, got 'test'"):
        list(SeqioConfig(name="q", task="bridge_text", split="test").build("").documents())


CAPITALS = [("France", "Paris"), ("Italy", "Rome"), ("Spain", "Madrid"), ("Cuba", "Havana")]


@pytest.fixture(scope="module")
def capitals(model_file):
    """An evaluation task as those of T5 are: texts, what was tokenized kept beside, metrics after postprocessing."""

    def examples(split, shuffle_files=False, seed=None):
        return tf.data.Dataset.from_tensor_slices(
            {
                "inputs": [f"capital of {country}?" for country, _ in CAPITALS],
                "targets": [city for _, city in CAPITALS],
                "options": [[city, "Oslo"] for _, city in CAPITALS],
            }
        )

    def right(targets, predictions):
        return {
            "right": seqio.metrics.Scalar(
                np.mean([t == p for t, p in zip(targets, predictions, strict=True)])
            ),
            "asked": len(targets),
            "shown": seqio.metrics.Text("no number"),
        }

    vocabulary = seqio.SentencePieceVocabulary(str(model_file))
    seqio.TaskRegistry.add(
        "bridge_capitals",
        source=seqio.FunctionDataSource(examples, splits=["train", "validation"]),
        preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
        output_features={name: seqio.Feature(vocabulary) for name in ("inputs", "targets")},
        postprocess_fn=lambda text, example, is_target: text if is_target else text.strip(".").title(),
        metric_fns=[right],
    )
    seqio.MixtureRegistry.add("bridge_capitals_mixture", [("bridge_capitals", 1.0)])
    yield "bridge_capitals"
    seqio.MixtureRegistry.remove("bridge_capitals_mixture")
    seqio.TaskRegistry.remove("bridge_capitals")


def test_a_seqio_task_is_an_evaluation_task_of_every_kind(capitals):
    first = {
        kind: SeqioTask(name="c", task=capitals, kind=kind).items("")[0]
        for kind in ("question", "choice", "last_word", "passage")
    }
    assert first["question"] == Question(id="0", prompt="capital of France?", answers=("Paris",))
    assert first["choice"] == Choice(
        id="0", contexts=("capital of France?",) * 2, continuations=(" Paris", " Oslo"), gold=0
    )
    assert first["last_word"] == LastWord(id="0", context="capital of France?", word=" Paris")
    assert first["passage"] == Passage(id="0", text="Paris")
    task = SeqioTask(name="c", task=capitals, examples_split="train")
    assert [item.answers[0] for item in task.examples("")] == [city for _, city in CAPITALS]
    assert "capital of Cuba? Havana\n\n" in few_shot_prefix(task, "", 4, seed=0)
    with pytest.raises(ConfigError, match=r"tasks.c.split must be one of train, validation, got 'test'"):
        SeqioTask(name="c", task=capitals, split="test").items("")
    with pytest.raises(
        ConfigError, match=r"bridge_capitals/validation:0: the example has no feature 'words'"
    ):
        SeqioTask(name="c", task=capitals, kind="choice", options_feature="words").items("")


def test_the_metrics_of_a_seqio_task_judge_the_answered_items_after_its_postprocessing(capitals):
    task = SeqioTask(name="c", task=capitals)
    assert isinstance(task, Judge)
    answers = {"0": "paris.", "2": "Lisbon", "3": "HAVANA"}
    assert task.judge("", answers) == {"seqio_right": pytest.approx(2 / 3), "seqio_asked": 3.0}
    assert SeqioTask(name="c", task="bridge_capitals_mixture").judge("", answers) == {}


def test_a_seqio_task_is_evaluated_with_its_metrics_beside_ours(capitals, tmp_path, capsys):
    model = ModelConfig(
        num_layers=1, width=16, num_heads=2, num_kv_heads=1, head_width=8, hidden_width=16, dtype="float32"
    )
    folder = str(export_model(tmp_path / "m", init_params(model, 260, 0), model, ByteTokenizer()))
    config = EvaluateConfig(
        model=folder,
        base=folder,
        tasks=(SeqioTask(name="c", task=capitals), SeqioTask(name="d", task=capitals, kind="choice")),
        max_items=3,
        max_new_tokens=4,
        row_length=64,
        workdir=str(tmp_path / "runs"),
    )
    found = evaluate(config, name="test")["tasks"]
    assert list(found["c"]["metrics"]) == ["exact_match", "seqio_right", "seqio_asked"]
    assert found["c"]["metrics"]["seqio_asked"] == {"value": 3.0, "low": None, "high": None, "items": 3}
    assert found["c"]["change"]["seqio_asked"]["value"] == 0.0
    assert list(found["d"]["metrics"]) == ["accuracy", "accuracy_per_character"]
    assert "seqio_asked" in capsys.readouterr().out


def test_a_task_becomes_rows(tasks, tmp_path):
    data = DataConfig(
        sources=(SeqioConfig(name="q", task="bridge_text"),),
        tokenizer=BytesConfig(),
        row_length=64,
        batch_rows=2,
        heldout_percent=10.0,
    )
    prepared = prepare_tables(data, tmp_path, 0, lambda *args: None)
    report = prepared.report["q"]
    assert report["train"]["documents"] + report["heldout"]["documents"] == len(TEXTS)
