"""The mixture plan: exact shares, exact caps, pure in (seed, step, slot)."""

import math
from fractions import Fraction

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from pretrain.config import ConfigError
from pretrain.data import mixture
from pretrain.data.mixture import BatchStage, MixturePlan, MixtureStage, replay_stages


@st.composite
def plans(draw):
    """Arguments of a plan, and the size of its blocks."""
    names = [f"s{i}" for i in range(draw(st.integers(1, 6)))]
    num_rows = {name: draw(st.integers(1, 40)) for name in names}
    caps = {name: draw(st.sampled_from([None, None, 0.5, 1.0, 1.7, 3.0])) for name in names}
    weight = st.sampled_from([0.0, 1.0, 0.1, 0.001, 1 / 3]) | st.floats(0, 1, allow_subnormal=False)
    starts = sorted({0, *draw(st.lists(st.integers(1, 40), max_size=3))})
    stages = []
    for start in starts:
        weights = {name: draw(weight) for name in names}
        if not sum(weights.values()):
            weights[names[0]] = 1.0
        stages.append(MixtureStage(start_step=start, weights=weights))
    batch_starts = sorted({0, *draw(st.lists(st.integers(1, 40), max_size=2))})
    batches = [BatchStage(start_step=start, batch_rows=draw(st.integers(1, 9))) for start in batch_starts]
    return (
        num_rows,
        stages,
        batches,
        caps,
        draw(st.integers(0, 5)),
        draw(st.sampled_from([1, 2, 5, 64, 2048])),
    )


def make(arguments):
    num_rows, stages, batches, caps, seed, block_rows = arguments
    mixture.BLOCK_ROWS = block_rows
    return MixturePlan(num_rows, stages, batch_stages=batches, seed=seed, max_epochs=caps)


@pytest.fixture(autouse=True)
def _restore_blocks():
    yield
    mixture.BLOCK_ROWS = 2048


def steps_of(plan, limit=60):
    return limit if plan.num_feasible_steps is None else min(limit, plan.num_feasible_steps)


def due_by(arguments, row):
    """Rows each source is due by `row`: the definition, one row at a time, with caps."""
    num_rows, stages, batches, caps, _, _ = arguments
    limit = {n: math.inf if caps[n] is None else math.floor(caps[n] * num_rows[n]) for n in num_rows}
    first_rows = []
    for stage in stages:
        rows = 0
        for step in range(stage.start_step):
            rows += [b.batch_rows for b in batches if b.start_step <= step][-1]
        first_rows.append(rows)
    due = {name: Fraction(0) for name in num_rows}
    at = Fraction(0)
    while at < row:
        number = max(i for i, first in enumerate(first_rows) if first <= at)
        weights = {n: Fraction(str(float(stages[number].weights[n]))) for n in num_rows if due[n] < limit[n]}
        total = sum(weights.values())
        # Until the row asked for, the next stage, or the first source that is full.
        step = min([Fraction(row), *[Fraction(f) for f in first_rows[number + 1 : number + 2]]]) - at
        for name, weight in weights.items():
            if weight and limit[name] != math.inf:
                step = min(step, (limit[name] - due[name]) * total / weight)
        for name, weight in weights.items():
            due[name] += step * weight / total
        at += step
    return due


@hypothesis.settings(max_examples=150)
@hypothesis.given(arguments=plans())
def test_no_source_is_a_row_off_its_share_at_any_block_boundary(arguments):
    plan = make(arguments)
    num_steps = steps_of(plan)
    block = 0
    while (
        plan._bounds(block)[1] <= plan.first_row(num_steps)
        and plan._bounds(block)[0] < plan._bounds(block)[1]
    ):
        end = plan._bounds(block)[1]
        counts = plan._counts_before(block + 1)
        assert sum(counts) == end
        for count, due in zip(counts, due_by(arguments, end).values(), strict=True):
            assert abs(count - due) < 1
        block += 1


@hypothesis.settings(max_examples=150)
@hypothesis.given(arguments=plans())
def test_caps_are_exact_and_elements_are_drawn_in_order_without_gaps(arguments):
    plan = make(arguments)
    num_rows, _, _, caps, _, _ = arguments
    drawn = {name: [] for name in num_rows}
    for step in range(steps_of(plan)):
        for source, element in zip(*plan.slots(step), strict=True):
            drawn[plan.names[source]].append(int(element))
    for name, elements in drawn.items():
        assert elements == list(range(len(elements)))
        if caps[name] is not None:
            assert len(elements) <= math.floor(caps[name] * num_rows[name])


@hypothesis.given(arguments=plans(), data=st.data())
def test_slots_are_a_pure_function_of_the_step(arguments, data):
    plan, num_steps = make(arguments), steps_of(make(arguments))
    hypothesis.assume(num_steps)
    order = data.draw(st.permutations(range(num_steps)))
    shuffled = {step: [x.tolist() for x in plan.slots(step)] for step in order}
    fresh = make(arguments)
    for step in range(num_steps):
        assert [x.tolist() for x in fresh.slots(step)] == shuffled[step]
        assert len(shuffled[step][0]) == fresh.batch_rows(step)


@hypothesis.given(arguments=plans())
def test_caps_end_a_run_exactly_where_rows_end(arguments):
    plan = make(arguments)
    feasible = plan.num_feasible_steps
    hypothesis.assume(feasible is not None)
    plan.check_steps(feasible)
    with pytest.raises(
        ConfigError, match=f"end after step {feasible} of {feasible + 1} .*run.num_steps={feasible}"
    ):
        plan.check_steps(feasible + 1)
    with pytest.raises(ConfigError, match=f"end after step {feasible}"):
        plan.slots(feasible)


def plan_of(weights, batch_rows=32, seed=0, caps=None, num_rows=1000, **stages):
    return MixturePlan(
        dict.fromkeys(weights, num_rows),
        [MixtureStage(start_step=0, weights=weights)],
        batch_stages=[BatchStage(start_step=0, batch_rows=batch_rows)],
        seed=seed,
        max_epochs=caps,
    )


def test_a_full_cap_is_reached_and_its_share_goes_to_the_others_in_proportion():
    plan = plan_of({"a": 1.0, "b": 1.0, "c": 2.0}, caps={"a": 0.5})
    before, after = plan.counts(62), plan.counts(10_000)
    assert abs(before["a"] - 62 * 32 / 4) <= 2048
    assert after["a"] == 500
    assert after["c"] / after["b"] == pytest.approx(2, rel=0.01)


def test_counts_are_what_the_slots_hold():
    plan = plan_of({"a": 0.7, "b": 0.3}, batch_rows=100)
    seen = np.zeros(2, int)
    for step in range(50):
        assert list(plan.counts(step).values()) == seen.tolist()
        seen += np.bincount(plan.slots(step)[0], minlength=2)


def test_another_seed_is_another_order_with_the_same_shares():
    one, two = (plan_of({"a": 0.5, "b": 0.5}, batch_rows=2048, seed=seed) for seed in (0, 1))
    assert one.slots(0)[0].tolist() != two.slots(0)[0].tolist()
    assert one.counts(1) == two.counts(1)


def test_the_order_inside_a_block_is_mixed():
    source_B, _ = plan_of({"a": 0.5, "b": 0.5}, batch_rows=2048).slots(0)
    runs = 1 + np.count_nonzero(np.diff(source_B))
    assert 900 < runs < 1150  # 1025 expected, standard deviation 23


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 1.0])
def test_replay_has_its_share(share):
    stages = replay_stages({"new": 1.0}, {"web": 3.0, "books": 1.0}, [(0, share)])
    plan = MixturePlan(
        {"new": 50, "web": 50, "books": 50},
        stages,
        batch_stages=[BatchStage(start_step=0, batch_rows=2048)],
        seed=0,
    )
    counts = plan.counts(10)
    assert abs(counts["web"] + counts["books"] - share * 20480) <= 1
    assert abs(counts["web"] - 3 * counts["books"]) <= 4


def test_replay_changes_at_its_step_exactly():
    stages = replay_stages({"new": 1.0}, {"old": 1.0}, [(0, 0.5), (3, 0.0)])
    plan = MixturePlan(
        {"new": 50, "old": 50}, stages, batch_stages=[BatchStage(start_step=0, batch_rows=10)], seed=0
    )
    assert plan.counts(3) == {"new": 15, "old": 15}
    assert all(plan.slots(step)[0].tolist() == [0] * 10 for step in range(3, 9))
    with pytest.raises(ConfigError, match=r"must lie in \[0, 1\], got 1.5"):
        replay_stages({"a": 1.0}, {"b": 1.0}, [(0, 1.5)])


def test_a_trillion_tokens_are_planned_without_a_table_of_rows():
    plan = plan_of({"a": 0.7, "b": 0.2, "c": 0.1}, batch_rows=1024, num_rows=10**8, caps={"c": 0.1})
    assert plan.counts(20_000)["c"] == pytest.approx(20_000 * 1024 * 0.1, abs=2048)


def test_faults_of_stages_are_named():
    with pytest.raises(ValueError, match="weights must not be negative"):
        MixtureStage(start_step=0, weights={"a": -1.0})
    with pytest.raises(ValueError, match="weights must not be negative, and one must be positive"):
        MixtureStage(start_step=0, weights={"a": 0.0})
    with pytest.raises(ValueError, match="batch_rows positive, got 0 and 0"):
        BatchStage(start_step=0, batch_rows=0)
    batches = [BatchStage(start_step=0, batch_rows=1)]
    with pytest.raises(ConfigError, match="begin at start_step 0 and rise, got start steps 5"):
        MixturePlan({"a": 1}, [MixtureStage(start_step=5, weights={"a": 1})], batch_stages=batches, seed=0)
    with pytest.raises(ConfigError, match="must weigh the sources a, got 'b'"):
        MixturePlan({"a": 1}, [MixtureStage(start_step=0, weights={"b": 1})], batch_stages=batches, seed=0)
    with pytest.raises(ConfigError, match="that have train rows, got 'a'"):
        MixturePlan({"a": 0}, [MixtureStage(start_step=0, weights={"a": 1})], batch_stages=batches, seed=0)
