"""The loader of the published files: lines of one article are one document, the gold answer is counted from one."""

import json

import pytest

from pretrain.config import ConfigError
from synth.tasks.quality_qa import QualityArticles, QualityQuestions

FILES = ("train", "dev")


def line(title, writer, questions, author="Doe, Jane"):
    return {
        "title": title,
        "author": author,
        "year": 1959,
        "writer_id": writer,
        "article": f"The text of {title}.",
        "questions": [
            {
                "question": f" {text} ",
                "question_unique_id": f"{title}{writer}{i}",
                "options": ["a", "b", "c", "d"],
                "gold_label": gold,
                "difficult": hard,
            }
            for i, (text, gold, hard) in enumerate(questions)
        ],
    }


@pytest.fixture
def root(tmp_path):
    lines = {
        "train": [
            line("Zebra", "1", [("who?", 1, 0), ("why?", 4, 1)]),
            line("Ant", "1", [("how?", 2, 0)]),
            line("Zebra", "2", [("when?", 3, 1)]),
        ],
        "dev": [line(title, "1", [("what?", 1, 0)]) for title in ("Bee", "Cat", "Dog")],
    }
    for name, records in lines.items():
        (tmp_path / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    return tmp_path


def test_lines_of_one_article_are_one_document_and_gold_counts_from_one(root):
    asked = QualityQuestions(paths=FILES, root=str(root)).load()
    of_zebra = [q for q in asked if q.document == "Zebra by Doe, Jane"]
    assert [(q.text, q.gold, q.tags) for q in of_zebra] == [
        ("who?", 0, ("other",)),
        ("why?", 3, ("hard",)),
        ("when?", 2, ("hard",)),
    ]
    assert asked == QualityQuestions(paths=FILES, root=str(root)).load()


def test_the_parts_split_documents_by_title(root):
    parts = {
        part: {q.document for q in QualityQuestions(paths=FILES, root=str(root), part=part).load()}
        for part in ("all", "validation", "test")
    }
    assert parts["validation"] == {"Ant by Doe, Jane"}
    assert parts["validation"] | parts["test"] == parts["all"]
    assert not parts["validation"] & parts["test"]


def test_a_form_names_the_document(root):
    form = "In the context of {document}: {question}"
    first = QualityQuestions(paths=FILES, root=str(root), form=form).load()[0]
    assert first.text == "In the context of Ant by Doe, Jane: how?"


def test_every_article_comes_once_under_its_title_author_and_year(root):
    documents = list(QualityArticles(name="quality", paths=FILES).build(str(root)).documents())
    assert [d.id for d in documents] == [f"{t} by Doe, Jane" for t in ("Zebra", "Ant", "Bee", "Cat", "Dog")]
    assert documents[0].text == '"Zebra" by Jane Doe, 1959\nThe text of Zebra.'
    asked = QualityQuestions(paths=FILES, root=str(root)).load()
    assert {q.document for q in asked} == {d.id for d in documents}


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="files of QuALITY must be there"):
        QualityArticles(name="quality", paths=FILES).build(str(tmp_path))
