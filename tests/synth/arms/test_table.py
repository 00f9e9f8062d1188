"""Cells against hand counts; a gap is 0 for the base, 1 for the ceiling, and nothing where there is no way to go."""

import numpy as np
import pytest

from synth.arms.table import Entry, Marks, accuracy_cell, gap_cell, marks_of, page, picture
from synth.question import Question


def questions(count, tag, document):
    return [
        Question(
            id=f"{document}{tag}{i}", document=document, text="?", options=("a", "b"), gold=0, tags=(tag,)
        )
        for i in range(count)
    ]


def marks(right, asked, replicate=None):
    replicate = np.zeros(len(right), int) if replicate is None else np.array(replicate)
    return Marks(right=np.array(right, float), asked=np.array(asked, float), replicate=replicate)


def test_marks_count_each_kind_by_document_and_an_unanswered_question_as_wrong():
    asked = [*questions(2, "same", "d"), *questions(1, "hop2", "d"), *questions(1, "same", "e")]
    answers = [(asked, [0, 1, 0, None]), (asked, [0, 0, 0, 0])]
    found = marks_of(answers, "same")
    assert found.right.tolist() == [1, 0, 2, 1]
    assert found.asked.tolist() == [2, 1, 2, 1]
    assert found.replicate.tolist() == [0, 0, 1, 1]
    assert marks_of(answers, None).asked.sum() == 8


def test_an_accuracy_is_the_share_of_right_answers_and_its_interval_holds_it():
    cell = accuracy_cell(marks([3, 1, 4, 0], [4, 4, 4, 4], [0, 0, 1, 1]))
    assert (cell.value, cell.num_questions, cell.by_replicate) == (0.5, 16, (0.5, 0.5))
    assert 0 <= cell.low < 0.5 < cell.high <= 1


def test_documents_that_agree_leave_no_interval():
    cell = accuracy_cell(marks([1, 1, 1], [4, 4, 4]))
    assert (cell.low, cell.high) == (0.25, 0.25)


def test_a_gap_is_paired_over_documents():
    """Base and ceiling differ by two answers in each document, so the middle is one half in every resample."""
    base, ceiling = marks([0, 3, 1], [9, 9, 9]), marks([2, 5, 3], [9, 9, 9])
    middle = marks([1, 4, 2], [9, 9, 9])
    for arm, value in ((base, 0.0), (middle, 0.5), (ceiling, 1.0)):
        cell = gap_cell(arm, base, ceiling)
        assert cell is not None
        assert (cell.value, cell.low, cell.high) == (value, value, value)


@pytest.mark.parametrize("ceiling", [[2, 5, 3], [3, 4, 3], [1, 1, 1]])
def test_there_is_no_gap_where_the_open_book_is_not_better(ceiling):
    base = marks([2, 5, 3], [9, 9, 9])
    assert gap_cell(base, base, marks(ceiling, [9, 9, 9])) is None


def test_page_and_picture_hold_every_arm():
    cell = accuracy_cell(marks([1, 2], [4, 4]))
    lines = [
        Entry(arm=arm, tokens=tokens, cells={"all": cell, "same": cell}, gaps={"all": cell, "same": None})
        for arm in ("raw", "entigraph")
        for tokens in (100, 200)
    ]
    text = page(lines, ["the gates: passed"], ("same",), {"raw": {"old": 1.0}, "entigraph": {"old": 1.5}})
    assert "| raw | 100 | 37.5 [25.0, 50.0] | 37.5 [25.0, 50.0] |" in text
    assert "| entigraph | 37.5 [25.0, 50.0] | no gap |" in text
    assert "| entigraph | 1.5000 |" in text
    assert picture(lines, ("all", "same"), lines[:1], "t").startswith(b"\x89PNG")
