"""Tasks read the layouts of their files, put questions as the harness does, and refuse files that are not theirs."""

import dataclasses
import gzip
import json
import os
from pathlib import Path

import pytest

from pretrain.config import ConfigError
from pretrain.evals.tasks import (
    LAMBADA,
    NATURAL_QUESTIONS,
    OPENBOOKQA,
    PIQA,
    WEB_QUESTIONS,
    WINOGRANDE,
    Choice,
    Options,
    Passages,
    choose_items,
    few_shot_prefix,
)

ARC = Options(name="arc", file="test.json", examples_file="train.json.gz")


def adapters(question, options, answer, word="Answer"):
    listed = " ".join(f"{word}{i}: {option}" for i, option in enumerate(options, 1))
    lower = word.lower()
    shape = "/".join(f"{lower}{i}" for i in range(1, len(options) + 1))
    blank = "\n\n" if word == "Answer" else " "
    instruction = f"Please choose: {question}\n\n{listed}{blank}{word if word == 'Answer' else 'Answer'} format: {shape}"
    return {"instruction": instruction, "answer": f"{lower}{answer + 1}"}


@pytest.fixture
def root(tmp_path):
    records = [
        adapters("What is red: blood or snow?", ["Answer: blood", "snow"], 0),
        adapters("Two\n\nparts?", ["a b", "c", "d", "e"], 3),
    ]
    (tmp_path / "test.json").write_text(json.dumps(records))
    with gzip.open(tmp_path / "train.json.gz", "wt") as file:
        json.dump([adapters(f"Q{i}?", ["yes", "no"], i % 2) for i in range(5)], file)
    return str(tmp_path)


def test_options_are_taken_from_the_instruction(root):
    first, second = ARC.items(root)
    assert first.contexts == ("Question: What is red: blood or snow?\nAnswer:",) * 2
    assert first.continuations == (" Answer: blood", " snow")
    assert (first.gold, second.gold) == (0, 3)
    assert second.contexts[0] == "Question: Two\n\nparts?\nAnswer:"
    assert second.continuations == (" a b", " c", " d", " e")


def test_few_shot_prompts_are_solved_examples_and_the_same_for_a_seed(root):
    prefix = few_shot_prefix(ARC, root, 3, seed=1)
    assert prefix == few_shot_prefix(ARC, root, 3, seed=1) != few_shot_prefix(ARC, root, 3, seed=2)
    examples = prefix.split("\n\n")[:-1]
    assert len(set(examples)) == 3
    assert set(examples) <= {item.solved() for item in ARC.examples(root)}
    assert few_shot_prefix(ARC, root, 0, seed=1) == ""
    with pytest.raises(ConfigError, match="must have 6 solved examples"):
        few_shot_prefix(ARC, root, 6, seed=1)


def test_a_blank_is_filled_and_the_rest_is_scored(tmp_path):
    record = adapters("Ann thanked Bea because _ had helped her.", ["Ann", "Bea"], 1, word="Option")
    with gzip.open(tmp_path / WINOGRANDE.file, "wt") as file:
        json.dump([record], file)
    (item,) = WINOGRANDE.items(str(tmp_path))
    assert item.contexts == ("Ann thanked Bea because Ann", "Ann thanked Bea because Bea")
    assert item.continuations == (" had helped her.",) * 2
    assert item.gold == 1


def test_labels_in_a_file_of_their_own_belong_line_by_line(tmp_path):
    with gzip.open(tmp_path / PIQA.file, "wt") as file:
        file.write(
            '{"goal": "Cut.", "sol1": "knife", "sol2": "spoon"}\n{"goal": "Eat.", "sol1": "knife", "sol2": "spoon"}\n'
        )
    with gzip.open(tmp_path / PIQA.labels_file, "wt") as file:
        file.write("0\n1\n")
    first, second = PIQA.items(str(tmp_path))
    assert (first.gold, second.gold) == (0, 1)
    assert first.solved() == "Question: Cut.\nAnswer: knife"
    with gzip.open(tmp_path / PIQA.labels_file, "wt") as file:
        file.write("0\n")
    with pytest.raises(ConfigError, match="a label for each record, got 1 for 2"):
        PIQA.items(str(tmp_path))


def test_the_last_word_is_apart_and_a_line_separator_inside_a_text_ends_nothing(tmp_path):
    with gzip.open(tmp_path / LAMBADA.file, "wt") as file:
        file.write('{"text": "one two\u2028three  four"}\n')
    (item,) = LAMBADA.items(str(tmp_path))
    assert (item.context, item.word) == ("one two\u2028three ", " four")


def test_open_questions_keep_all_answers(tmp_path):
    with gzip.open(tmp_path / WEB_QUESTIONS.file, "wt") as file:
        json.dump([{"qText": "who ?", "answers": ["A", "B"]}, {"qText": "what", "answers": ["C"]}], file)
    first, second = WEB_QUESTIONS.items(str(tmp_path))
    assert first.answers == ("A", "B")
    assert second.solved() == "Question: what?\nAnswer: C"


def test_natural_questions_are_put_as_in_the_harness(tmp_path):
    with gzip.open(tmp_path / NATURAL_QUESTIONS.file, "wt") as file:
        file.write('{"question": "who {wrote} it", "answer": ["A"]}\n')
    (item,) = NATURAL_QUESTIONS.items(str(tmp_path))
    assert item.prompt == "Q: who {wrote} it?\nA:"
    assert item.stop == ("\n", ".", ",")
    assert few_shot_prefix(NATURAL_QUESTIONS, str(tmp_path), 0, seed=0) == "Answer these questions:\n\n"
    shots = dataclasses.replace(NATURAL_QUESTIONS, examples_file=NATURAL_QUESTIONS.file)
    assert few_shot_prefix(shots, str(tmp_path), 1, seed=0) == (
        "Answer these questions:\n\nQ: who {wrote} it?\nA: A\n\n"
    )


def test_passages_are_records_or_a_whole_text(tmp_path):
    (tmp_path / "a.txt").write_text("x\n\ny")
    (tmp_path / "b.jsonl").write_text('{"text": "x"}\n{"text": ""}\n')
    assert [p.text for p in Passages(name="a", file="*.txt").items(str(tmp_path))] == ["x\n\ny"]
    assert [p.text for p in Passages(name="b", file="b.jsonl").items(str(tmp_path))] == ["x"]
    with pytest.raises(ConfigError, match="must find one file"):
        Passages(name="c", file="*").items(str(tmp_path))


def test_a_missing_or_damaged_file_is_one_clear_line(tmp_path):
    with pytest.raises(
        ConfigError, match=r"task openbookqa must find its file below data_root, got .*No such file"
    ):
        OPENBOOKQA.items(str(tmp_path))
    (tmp_path / OPENBOOKQA.file).write_bytes(b"not gzip")
    with pytest.raises(ConfigError, match="openbookqa"):
        OPENBOOKQA.items(str(tmp_path))
    (tmp_path / "test.json").write_text('[{"instruction": "x: y", "answer": "answer1"}]')
    with pytest.raises(ConfigError, match="must list options"):
        ARC.items(str(tmp_path))


def test_a_gzip_file_that_is_damaged_inside_is_one_clear_line(tmp_path):
    path = tmp_path / LAMBADA.file
    data = bytearray(gzip.compress(json.dumps({"text": " ".join(map(str, range(3000)))}).encode()))
    data[len(data) // 2] ^= 0xFF
    data[len(data) // 2 + 1] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(ConfigError, match="task lambada must find its file"):
        LAMBADA.items(str(tmp_path))
    path.write_bytes(data[:10] + b"\xff" * 50)
    with pytest.raises(ConfigError, match="task lambada must find its file"):
        LAMBADA.items(str(tmp_path))


@pytest.mark.parametrize(
    ("task", "record", "said"),
    [
        (ARC, {"answer": "answer1"}, "arc 0 must be an object with 'instruction', got the keys 'answer'"),
        (ARC, "text", "arc 0 must be an object with 'instruction', got 'text'"),
        (dataclasses.replace(LAMBADA, file="test.json"), {"words": 1}, "lambada 0 must be an object with 'text'"),
        (dataclasses.replace(LAMBADA, file="test.json"), {"text": 1}, "lambada 0 must hold a text under 'text', got 1"),
        (dataclasses.replace(WEB_QUESTIONS, file="test.json"), {"qText": "x"}, "webquestions 0 .* with 'answers'"),
        (dataclasses.replace(WEB_QUESTIONS, file="test.json"), {"qText": "x", "answers": "Rome"}, "a list of texts .* got 'Rome'"),
        (Passages(name="p", file="test.json"), {"body": "x"}, "p 0 must be an object with 'text'"),
    ],
)  # fmt: skip
def test_a_record_without_its_keys_is_one_clear_line(tmp_path, task, record, said):
    (tmp_path / "test.json").write_text(json.dumps([record]))
    with pytest.raises(ConfigError, match=said) as caught:
        task.items(str(tmp_path))
    assert len(caught.value.faults) == 1


def test_labels_are_numbers_of_the_two_ways(tmp_path):
    task = dataclasses.replace(PIQA, file="a.jsonl", labels_file="labels.lst")
    (tmp_path / "a.jsonl").write_text('{"goal": "Cut.", "sol1": "knife", "sol2": "spoon"}\n')
    for label in ("2", "x"):
        (tmp_path / "labels.lst").write_text(label)
        with pytest.raises(ConfigError, match=f"piqa 0 must have the label 0 or 1, got '{label}'"):
            task.items(str(tmp_path))


def test_items_are_drawn_once_by_the_seed():
    items = [Choice(id=str(i), contexts=("a", "b"), continuations=("c", "d"), gold=0) for i in range(50)]
    drawn = choose_items(items, 10, seed=3)
    assert drawn == choose_items(items, 10, seed=3) != choose_items(items, 10, seed=4)
    assert [int(i.id) for i in drawn] == sorted({int(i.id) for i in drawn})
    assert choose_items(items, None, seed=3) == choose_items(items, 50, seed=3) == items


def test_the_real_files_are_read_whole():
    """Counts as the data's README states them."""
    root = Path(os.environ.get("AUTODIDACT_DATA", Path(__file__).parents[4] / "shared" / "data")) / "eval"
    if not (root / LAMBADA.file).exists():
        pytest.skip("no evaluation files at ../shared/data or $AUTODIDACT_DATA")
    assert len(LAMBADA.items(str(root))) == 5153
    assert len(PIQA.items(str(root))) == 1838
    assert all(len(item.contexts) == 4 for item in OPENBOOKQA.items(str(root)))
    assert all(len(item.contexts) == 2 for item in WINOGRANDE.items(str(root)))
    assert len(WEB_QUESTIONS.items(str(root))) == 2032
