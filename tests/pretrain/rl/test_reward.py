"""Rewards: numbers are compared as fractions, and texts that play with the checker earn nothing."""

import dataclasses
import json
import re
from fractions import Fraction

import pytest

from pretrain.config import ConfigError
from pretrain.rl.problem import ArithmeticConfig, Problem, QuestionFileConfig
from pretrain.rl.reward import NumberReward, RandomReward, read_number

PROBLEM = Problem(id="p", prompt="?", answer="1,234.5")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12", Fraction(12)),
        (" -3.50 ", Fraction(-7, 2)),
        ("1,234", Fraction(1234)),
        ("$5", Fraction(5)),
        ("3/4", Fraction(3, 4)),
        ("50%", Fraction(1, 2)),
        ("18.", Fraction(18)),
        (".5", Fraction(1, 2)),
        ("-0", Fraction(0)),
        (r"\$1,\!234", Fraction(1234)),
        (r"12.5\%", Fraction(1, 8)),
    ],
)
def test_numbers_are_read(text, value):
    assert read_number(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        "1 2",
        "1,23",
        "3/0",
        "1/2/3",
        "1.5/2",
        "1e9",
        "0x10",
        "\u0661",
        "__import__('os')",
        "9" * 4000,
        "nan",
        "inf",
        "12 apples",
        "\u22125",
        "\uff15",
        "5 %%",
        "1,2345",
        r"1\,234",
        r"\!",
        "+-5",
        "1e999999999",
        "3 or 4",
    ],
)
def test_what_is_no_number_is_none(text):
    assert read_number(text) is None


@pytest.mark.parametrize(
    ("place", "text", "reward"),
    [
        ("whole", "1234.5", 1.0),
        ("whole", "1234.5 1234.5", 0.0),
        ("whole", "1234.5\n7", 0.0),
        ("hashes", "so it is\n#### 1,234.50", 1.0),
        ("hashes", "#### 1234.5\n#### 7", 0.0),
        ("hashes", "1234.5", 0.0),
        ("boxed", r"thus \boxed{2469/2}", 1.0),
        ("boxed", r"\boxed{7} or \boxed{1234.5}", 0.0),
        ("boxed", r"\boxed {7} or \boxed{1234.5}", 0.0),
        ("boxed", r"\fbox{7} or \boxed{1234.5}", 0.0),
        ("boxed", r"\boxed{1234.5} = \boxed{1234.5}", 0.0),
        ("boxed", r"boxed in: \boxed{1234.5}", 1.0),
        ("boxed", r"\boxed{1234.5 \text{ or } 7}", 0.0),
        ("boxed", r"\boxed{__import__('os').system('id') or 1234.5}", 0.0),
        ("whole", "lambda: 1234.5", 0.0),
        ("whole", "float('1234.5')", 0.0),
        ("whole", "Symbol('x', value=1234.5)", 0.0),
        ("whole", "9**9**9**9", 0.0),
        ("hashes", "#### 1234.5 or 7", 0.0),
        ("boxed", r"\boxed{1234.5", 0.0),
        ("boxed", r"\boxed{exec(open('/etc/passwd').read())}", 0.0),
        ("boxed", r"\boxed{\boxed{1234.5}}", 0.0),
    ],
)
def test_only_one_answer_in_its_place_counts(place, text, reward):
    assert NumberReward(place=place)(PROBLEM, text) == reward


def test_a_wrong_number_in_the_right_place_earns_the_format_reward():
    reward = NumberReward(format_reward=0.1)
    assert [reward(PROBLEM, text) for text in ("1234.5", "7", "seven")] == [1.0, 0.1, 0.0]


def test_a_reference_that_is_no_number_is_named():
    with pytest.raises(
        ValueError, match="p must have a number as its answer, got 'x=2'; ExpressionReward reads"
    ):
        NumberReward(format_reward=0.1)(Problem(id="p", prompt="?", answer="x=2"), "2")


def test_a_random_reward_looks_at_no_answer():
    rewards = [RandomReward(chance=0.25)(PROBLEM, str(i)) for i in range(2000)]
    assert set(rewards) == {0.0, 1.0}
    assert 0.2 < sum(rewards) / 2000 < 0.3
    assert rewards == [RandomReward(chance=0.25)(PROBLEM, str(i)) for i in range(2000)]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: RandomReward(chance=2.0), "chance must lie in [0, 1], got 2.0"),
        (lambda: RandomReward(chance=float("nan")), "chance must lie in [0, 1], got nan"),
        (lambda: QuestionFileConfig(train_path="a", heldout_path="b", num_train=0), "num_train must be at least 1 or none, got 0"),
        (lambda: QuestionFileConfig(train_path="a", heldout_path="b", num_heldout=-1), "num_heldout must be at least 1 or none"),
        (lambda: QuestionFileConfig(train_path="a", heldout_path="b", max_question_characters=0), "max_question_characters must"),
        (lambda: QuestionFileConfig(train_path="a", heldout_path="b", template="?"), "template must hold {question}"),
    ],
)  # fmt: skip
def test_settings_that_say_nothing_are_refused(make, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        make()


def test_arithmetic_is_right_and_its_halves_are_apart():
    config = ArithmeticConfig(max_operand=9, operators=("+", "-"), num_train=150, num_heldout=50)
    train, heldout = config.train(), config.heldout()
    assert len({p.id for p in train} | {p.id for p in heldout}) == 200
    for problem in (*train, *heldout):
        assert eval(problem.prompt.rstrip("=")) == int(problem.answer)
    with pytest.raises(ConfigError, match="together at most 200"):
        ArithmeticConfig(max_operand=9, operators=("+", "-"), num_train=151, num_heldout=50)


def test_question_files_are_read_and_a_broken_line_is_named(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text('{"question": "1+1?", "answer": "two\\n#### 2"}\n')
    config = QuestionFileConfig(train_path=str(path), heldout_path=str(path))
    assert [p.answer for p in config.train()] == ["2"]
    assert config.train()[0].prompt == "Question: 1+1?\nAnswer:"
    path.write_text('{"question": "1+1?"}\n')
    with pytest.raises(ConfigError, match=r"q\.jsonl:1"):
        config.train()


def test_a_template_may_hold_tex_and_long_questions_are_left_out(tmp_path):
    path = tmp_path / "q.jsonl"
    lines = [{"problem": "1" * n + r"+\frac{1}{2}", "answer": "3/2"} for n in (1, 50, 2)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = QuestionFileConfig(
        train_path=str(path), heldout_path=str(path), question_key="problem",
        template=r"{question} = \boxed{", max_question_characters=20, num_heldout=2,
    )  # fmt: skip
    assert [p.prompt for p in config.train()] == [r"1+\frac{1}{2} = \boxed{", r"11+\frac{1}{2} = \boxed{"]
    assert [p.id for p in config.heldout()] == ["q.jsonl:1", "q.jsonl:3"]
    with pytest.raises(ConfigError, match="at least one problem of at most 5 characters"):
        dataclasses.replace(config, max_question_characters=5).train()
