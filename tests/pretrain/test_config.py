"""Configs: typed overrides, errors that name the nearest key, JSON both ways, identity."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.config import (
    ConfigError,
    apply_overrides,
    diff,
    fingerprint,
    from_json,
    load_config,
    local,
    parse_argv,
    stable_seed,
    to_json,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leaf:
    name: str = "leaf"
    count: int = 1
    rate: float = 0.5
    shape: tuple[int, ...] = (1, 2)
    shares: dict[str, float] = dataclasses.field(default_factory=dict)
    limit: int | None = local(None)

    def __post_init__(self):
        if self.count < 0:
            raise ValueError(f"count must not be negative, got {self.count}")
        if self.rate > self.count:
            raise ValueError(f"rate must not exceed count={self.count}, got {self.rate}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tree:
    one: Leaf = Leaf()
    many: tuple[Leaf, ...] = (Leaf(name="a"), Leaf(name="b"))


@given(
    count=st.integers(0, 10**9),
    rate=st.floats(-1e9, 0, allow_nan=False),
    limit=st.none() | st.integers(-5, 5),
    shape=st.lists(st.integers(0, 99), max_size=4),
)
def test_overrides_parse_what_they_print(count, rate, limit, shape):
    keys = {"count": count, "rate": rate, "limit": limit, "shape": tuple(shape)}
    tree = apply_overrides(Tree(), [f"one.{k}={v}" for k, v in keys.items()])
    assert dataclasses.replace(Leaf(), **keys) == tree.one
    assert from_json(to_json(tree)) == tree


def test_integers_may_be_written_in_scientific_notation_but_not_lose_a_fraction():
    assert apply_overrides(Tree(), ["one.count=2e3"]).one.count == 2000
    with pytest.raises(ConfigError, match=r"one\.count must be an integer, got '0\.5'"):
        apply_overrides(Tree(), ["one.count=0.5"])


def test_unknown_key_names_the_nearest():
    with pytest.raises(ConfigError, match=r"unknown config key one\.cuont; did you mean one\.count\?"):
        apply_overrides(Tree(), ["one.cuont=3"])


def test_all_faults_are_reported_at_once():
    with pytest.raises(ConfigError) as error:
        apply_overrides(Tree(), ["one.cuont=3", "one.rate=fast", "many.c.count=1"])
    assert len(error.value.faults) == 3


def test_elements_of_a_tuple_are_named_by_index_or_by_name():
    tree = apply_overrides(Tree(), ["many.b.count=7", "many.0.count=5"])
    assert [leaf.count for leaf in tree.many] == [5, 7]


def test_checks_see_only_the_final_state_and_carry_their_path():
    assert apply_overrides(Tree(), ["one.rate=8", "one.count=9"]).one.rate == 8
    with pytest.raises(ConfigError, match=r"one\.count must not be negative, got -1"):
        apply_overrides(Tree(), ["one.count=-1"])


@pytest.mark.parametrize("value", ["nan", "inf", "1e400", "-inf"])
def test_numbers_are_finite(value):
    """Checks are comparisons, and nan passes most of them unseen."""
    for key in ("one.rate", "one.count"):
        with pytest.raises(ConfigError, match=rf"{key} must be .*, got '{value}'"):
            apply_overrides(Tree(), [f"{key}={value}"])


def test_local_fields_are_not_identity():
    tree = Tree()
    assert fingerprint(apply_overrides(tree, ["one.limit=3"])) == fingerprint(tree)
    changed = apply_overrides(tree, ["many.a.count=3"])
    assert fingerprint(changed) != fingerprint(tree)
    assert diff(tree, changed) == [("many.0.count", 1, 3)]


def test_load_config_reports_what_is_wrong_with_the_file(tmp_path):
    with pytest.raises(ConfigError, match="not there"):
        load_config(tmp_path / "none.py")
    (tmp_path / "smoke.py").write_text("x = 1\n")
    with pytest.raises(ConfigError, match=r"must define get_config"):
        load_config(tmp_path / "smoke.py")
    with pytest.raises(ConfigError, match=r"did you mean .*smoke\.py"):
        load_config(tmp_path / "smok.py")
    (tmp_path / "smoke.py").write_text("def get_config():\n    return nothing\n")
    with pytest.raises(ConfigError, match="fails to load: NameError"):
        load_config(tmp_path / "smoke.py")


def test_parse_argv_takes_one_form_only():
    assert parse_argv(["a.b=1", "--config", "x.py", "c=d=e"]) == ("x.py", ["a.b=1", "c=d=e"])
    for argv in (["a=1"], ["--config", "x.py", "--steps", "3"], ["--config", "x.py", "word"]):
        with pytest.raises(ConfigError):
            parse_argv(argv)


def test_stable_seed_is_the_same_everywhere():
    assert stable_seed("a", 1) == 4742018630964328543
    assert stable_seed("a", 1) != stable_seed("a1")
