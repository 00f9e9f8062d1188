r"""Expressions: equal ones are equal however they are written, and what plays with the checker is no answer."""

import math
import time

import hypothesis.strategies as st
import pytest
from hypothesis import given

from pretrain.config import ConfigError
from pretrain.rl.expression import _points, read_expression
from pretrain.rl.problem import Problem
from pretrain.rl.reward import ExpressionReward


def reward(answer, text):
    return ExpressionReward(place="whole", format_reward=0.1)(
        Problem(id="p", prompt="?", answer=answer), text
    )


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (r"\frac{1}{2}", "1/2"),
        (r"\frac12", r"\dfrac{1}{2}"),
        (r"\frac{1}{2}", "0.5"),
        (r"2\frac{3}{4}", "11/4"),
        (r"\frac{3\sqrt{2}}{2}", r"\frac{3}{\sqrt{2}}"),
        (r"\sqrt{8}", r"2\sqrt{2}"),
        (r"\sqrt[3]{2}", r"2^{1/3}"),
        ("x^2+2x+1", "(x+1)^2"),
        ("x^2-1", r"(x-1)(x+1)"),
        (r"2\pi r", r"r \cdot 2 \pi"),
        ("-x", "-1x"),
        ("-2^2", "-4"),
        ("(1, 2)", r"\left(1,\, \frac{4}{2}\right)"),
        ("[0, 1)", "[0,1)"),
        (r"90^\circ", "90"),
        (r"\$5", "5"),
        (r"x \le 5", r"x \le  5"),  # beyond the grammar: by its words
        ("1,234", "1234"),
        (r"\text{even}", r"\text{even}"),
        (r"362,\!880", "362880"),  # as MATH writes thousands
        (r"11,\! 111,\! 100", r"11,111,100"),
        (r"\$1,\!657", r"\$1657"),
        (r"18\%", "18%"),
        ("-2,1", "-2, 1"),  # beyond the grammar too: white space beside signs is none
        (r"x \le 5", r"x\le 5"),
        ("2^{40}", "1099511627776"),
        ("10^{-20}", r"\frac{1}{10^{20}}"),
        (r"\frac{1}{\frac{2}{3}}", r"\frac{\frac{3}{1}}{2}"),
        ("(x+y)^{9}-(x-y)^9", "(x+y)^9+(y-x)^9"),
        ("0", "-0"),
    ],
)
def test_equal_answers_are_right(answer, text):
    assert reward(answer, text) == 1.0


@pytest.mark.parametrize(
    ("answer", "text", "earned"),
    [
        (r"\frac{1}{2}", r"\frac{1}{3}", 0.1),
        (r"\frac{1}{3}", "0.33333333", 0.1),
        (r"\frac{1}{3}", "0." + "3" * 30, 0.1),
        # Whole and rational values are compared exactly, however large or small.
        ("2^{40}", "1099511627777", 0.1),
        ("123456789012345", "123456789012346+0", 0.1),
        ("10^{-20}", "0", 0.1),
        ("10^{-20}", "1-1", 0.1),
        ("x", r"x+\frac{1}{10^{15}}", 0.1),
        ("5 5", "55", 0.0),
        ("12 a", "12a, 3", 0.0),
        (r"\text{a b}", r"\text{ab}", 0.0),
        ("1/3", "0.333333333333333333", 0.1),  # of two plain numbers nothing is rounded
        (r"\sqrt{2}", "1.414", 0.1),
        ("x+1", "x+2", 0.1),
        ("x^2", "x", 0.1),
        ("(1, 2)", "(2, 1)", 0.1),
        ("(1, 2)", "[1, 2]", 0.1),
        ("(1, 2)", "(1, 2, 2)", 0.1),
        ("[0, 1)", "[0, 1]", 0.1),
        ("5", "5 5", 0.0),  # two answers
        ("25", "5 5", 0.0),
        ("5", "5 or 7", 0.0),
        ("5", "5 = 5", 0.0),
        ("5", "5, 7", 0.0),
        ("5", "", 0.0),
        ("x", "__import__('os').system('id')", 0.0),
        ("x", "lambda: x", 0.0),
        ("x", "Symbol('x')", 0.0),
        ("x", "x.subs(x, 1)", 0.0),
        ("x", "x; x", 0.0),
        ("5", "9^9^9^9", 0.0),
        ("5", "1/0", 0.0),
        ("5", r"\frac{1}{0}", 0.0),
        ("5", "10^{64}^{64}", 0.0),
        ("5", "(((9^{64})^{64})^{64})^{64}", 0.0),
        ("5", "*".join(["9^{64}"] * 28), 0.0),
        (r"\sqrt{2}", "10^{300}", 0.0),
        (r"\sqrt{2}", "10^{64}*10^{64}*10^{64}*10^{64}*10^{64}", 0.1),
        ("5", "\u0665", 0.0),
        ("5", "5\uff0e0", 0.0),
        ("5", "-5", 0.1),
        ("5", "5%", 0.1),
        ("3", "answer: 3 or 4", 0.0),
        ("5", "5 cm", 0.1),
        ("5", "(" * 150 + "5", 0.0),
        ("5", "(" * 99 + "5" + ")" * 99, 0.0),
        ("5", "5" + "+0" * 200, 0.0),
        ("5", "\\input{/etc/passwd}", 0.0),
        ("5", "5\x00", 0.0),
        (r"x \le 5", r"x \le 6", 0.0),
    ],
)
def test_what_is_wrong_or_plays_with_the_checker_earns_nothing(answer, text, earned):
    assert reward(answer, text) == earned


LEAVES = st.one_of(st.integers(1, 9).map(str), st.sampled_from(["x", "y", r"\pi"]))
EXPRESSIONS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from("+-*"), inner).map(lambda t: f"({t[0]}{t[1]}{t[2]})"),
        st.tuples(inner, inner).map(lambda t: rf"\frac{{{t[0]}}}{{{t[1]}}}"),
        inner.map(lambda t: rf"\sqrt{{{t}}}"),
    ),
    max_leaves=6,
)


@given(EXPRESSIONS)
def test_the_value_is_that_of_python_where_python_can_read_it(text):
    """Python's own evaluation of texts that the test made, with the letters at this grammar's points."""
    found = read_expression(text)
    if found is None:  # a division by zero, such as 1/(x-x)
        return
    code = text
    while r"\frac" in code or r"\sqrt" in code:
        start = max(code.rfind(r"\frac"), code.rfind(r"\sqrt"))  # the innermost stands last
        head, rest = code[:start], code[start:]
        groups, at = [], rest.index("{")
        for _ in range(2 if rest.startswith(r"\frac") else 1):
            depth, begin = 0, at
            while True:
                depth += (rest[at] == "{") - (rest[at] == "}")
                at += 1
                if depth == 0:
                    break
            groups.append(rest[begin + 1 : at - 1])
        made = f"(({groups[0]})/({groups[1]}))" if len(groups) == 2 else f"((({groups[0]})+0j)**0.5)"
        code = head + made + rest[at:]
    code = code.replace(r"\pi", "pi")
    for value, point in zip(found.values[0], _points(), strict=True):
        assert value == pytest.approx(eval(code, {"pi": math.pi, **point}), rel=1e-9, abs=1e-9)


@given(st.text(max_size=60))
def test_no_text_raises(text):
    assert reward("x+1", text) in (0.0, 0.1, 1.0)


def test_the_dearest_texts_cost_little():
    """A text that takes the time of its sample away would be dropped, and dropped is better than wrong."""
    for text in ("*".join(["(9^{64})^{4}"] * 14), "+".join(["1/x^{64}"] * 22), "+".join(f"1/{10**9 + k}" for k in range(14)),
                 r"\sqrt" * 39 + "2", r"\frac" * 39 + "2", "-" * 199 + "5"):  # fmt: skip
        began = time.perf_counter()
        reward("x+1", text)
        assert time.perf_counter() - began < 0.25, text


def test_a_unit_in_a_box_is_no_second_box():
    problem = Problem(id="p", prompt="?", answer=r"864 \mbox{ inches}^2")
    assert ExpressionReward()(problem, r"\boxed{864 \mbox{ inches}^2}") == 1.0
    assert ExpressionReward()(problem, r"\fbox{3} \boxed{864 \mbox{ inches}^2}") == 0.0


def test_places_and_bad_settings_are_those_of_numbers():
    boxed = ExpressionReward()
    problem = Problem(id="p", prompt="?", answer=r"\frac{1}{2}")
    assert boxed(problem, r"so \boxed{\frac{2}{4}}") == 1.0
    assert boxed(problem, r"\boxed{\frac{1}{2}} or \boxed{3}") == 0.0
    with pytest.raises(ConfigError, match="place must be one of"):
        ExpressionReward(place="here")
