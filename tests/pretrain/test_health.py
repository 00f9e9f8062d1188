"""Health: the guard's rule against plain numpy, bits kept on a skip, hashes, signals, the watchdog."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from pretrain import health
from pretrain.config import ConfigError
from pretrain.health import REASONS, HealthConfig, Ledger, StopSignal, TooManySkips, Watchdog, read_ledger

SMALL = HealthConfig(window_steps=8, min_accepted=4)
_guard = jax.jit(health.guard, static_argnums=3)


def run_guard(pairs, config=SMALL):
    """Feed (loss, norm) pairs; the list of decisions and the last state."""
    state, decisions = health.init_health(config), []
    for loss, norm in pairs:
        state, ok = _guard(state, jnp.float32(loss), jnp.float32(norm), config)
        decisions.append(bool(ok))
    return decisions, state


def expected_decisions(pairs, config):
    """The rule in numpy, on plain lists."""
    losses: list[float] = []
    norms: list[float] = []
    decisions = []
    for loss, norm in pairs:
        ok = math.isfinite(loss) and math.isfinite(norm)
        if ok and len(losses) >= config.min_accepted:
            for value, history in ((loss, losses), (norm, norms)):
                window = np.asarray(history[-config.window_steps :], np.float64)
                sigma = max(window.std(), config.min_relative_sigma * abs(window.mean()))
                ok = ok and value <= window.mean() + config.num_sigmas * sigma
        if ok:
            losses.append(loss)
            norms.append(norm)
        decisions.append(ok)
    return decisions


# Values on a coarse grid, so that float32 and float64 never disagree about a value just at the limit.
_value = st.one_of(
    st.integers(1, 40).map(lambda n: n / 8),
    st.sampled_from([1000.0, math.nan, math.inf, -math.inf]),
)


@given(st.lists(st.tuples(_value, _value), max_size=40))
def test_guard_follows_the_rule(pairs):
    decisions, state = run_guard(pairs)
    assert decisions == expected_decisions(pairs, SMALL)
    assert int(state["accepted"]) == sum(decisions)
    assert int(state["skipped"]) == len(pairs) - sum(decisions)
    tail = list(reversed(decisions))
    assert int(state["consecutive_skips"]) == (tail.index(True) if True in tail else len(tail))
    assert np.isfinite(np.asarray(state["loss_window"])).all()
    assert np.isfinite(np.asarray(state["norm_window"])).all()


@pytest.mark.parametrize(
    ("loss", "norm", "reason"),
    [
        (math.nan, 1.0, "loss not finite"),
        (math.inf, 1.0, "loss not finite"),
        (-math.inf, 1.0, "loss not finite"),
        (1.0, math.nan, "gradient norm not finite"),
        (1.0, math.inf, "gradient norm not finite"),
    ],
)
def test_non_finite_values_are_skipped_from_step_zero_on(loss, norm, reason):
    decisions, state = run_guard([(loss, norm)])
    assert decisions == [False]
    assert REASONS[int(state["reason"])] == reason


def test_spikes_count_from_the_64th_accepted_step_over_the_last_128():
    config = HealthConfig()
    wave = [(2.0 + 0.1 * (-1) ** i, 1.0 + 0.1 * (-1) ** i) for i in range(200)]
    decisions, _ = run_guard([*wave[:63], (100.0, 1.0)], config)
    assert all(decisions), "63 accepted steps are too few to call a spike"
    decisions, state = run_guard([*wave[:64], (2.75, 1.0)], config)
    assert decisions == [True] * 64 + [False], "6.5 sigma of a full window is a spike"
    assert REASONS[int(state["reason"])] == "loss spike"
    decisions, state = run_guard([*wave[:64], (2.55, 1.0)], config)
    assert all(decisions), "5.5 sigma is not"
    decisions, state = run_guard([*wave, (2.0, 1.75)], config)
    assert decisions == [True] * 200 + [False]
    assert REASONS[int(state["reason"])] == "gradient norm spike"
    high_then_low = (
        [(50.0 + i % 2, norm) for i, (_, norm) in enumerate(wave[:72])] + wave[:128] + [(3.0, 1.0)]
    )
    decisions, _ = run_guard(high_then_low, config)
    assert decisions == [True] * 200 + [False], "what lies more than 128 accepted steps back no longer counts"


@pytest.mark.parametrize("changes", [(), (150,), (40, 150)])
def test_where_the_data_changes_its_kind_the_windows_begin_anew(changes):
    values = [(2.0 + 0.1 * (-1) ** i, 1.0) for i in range(150)] + [
        (5.0 + 0.1 * (-1) ** i, 3.0) for i in range(80)
    ]
    values.append((9.0, 3.0))

    @jax.jit
    def step(state, number, loss, norm):
        return health.guard(health.renewed(state, number, changes), loss, norm, HealthConfig())

    state, decisions = health.init_health(), []
    for number, (loss, norm) in enumerate(values):
        state, ok = step(state, jnp.int32(number), jnp.float32(loss), jnp.float32(norm))
        decisions.append(bool(ok))
    # What comes later is judged by its own kind.
    assert decisions == [True] * 150 + [bool(changes)] * 80 + [False]


def test_a_flat_window_does_not_make_rounding_a_spike():
    decisions, _ = run_guard([(2.0, 1.0)] * 8 + [(2.0 + 1e-6, 1.0 + 1e-6), (2.1, 1.0)])
    assert decisions == [True] * 9 + [False]


def test_a_skipped_step_changes_no_bit():
    optimizer = optax.adamw(1e-2)
    params = {"w": jnp.arange(6.0).reshape(2, 3), "b": jnp.zeros(3)}
    opt_state = optimizer.init(params)

    @jax.jit
    def step(params, opt_state, state, scale):
        grads = jax.tree.map(lambda p: p * scale + 1.0, params)
        with jax.numpy_dtype_promotion("standard"):
            updates, new_opt = optimizer.update(grads, opt_state, params)
            new_params = optax.apply_updates(params, updates)
        state, ok = health.guard(state, jnp.float32(1.0) * scale, optax.tree.norm(grads), SMALL)
        return (*health.keep_if(ok, (new_params, new_opt), (params, opt_state)), state, ok)

    state = health.init_health(SMALL)
    params, opt_state, state, ok = step(params, opt_state, state, 1.0)
    assert ok
    before = jax.device_get((params, opt_state, state["loss_window"], state["norm_window"]))
    params, opt_state, state, ok = step(params, opt_state, state, math.nan)
    assert not ok
    after = jax.device_get((params, opt_state, state["loss_window"], state["norm_window"]))
    jax.tree.map(np.testing.assert_array_equal, before, after)
    _, opt_state, _, ok = step(params, opt_state, state, 1.0)
    assert ok
    assert int(opt_state[0].count) == 2


def test_health_config_names_all_faults_at_once():
    with pytest.raises(ValueError, match=r"(?s)min_accepted.*num_sigmas.*max_consecutive_skips"):
        HealthConfig(min_accepted=200, num_sigmas=0.0, max_consecutive_skips=0)
    with pytest.raises(ValueError, match="min_relative_sigma must not be negative, got -1"):
        HealthConfig(min_relative_sigma=-1.0)
    assert TooManySkips("x").exit_code == 6


def test_ledger_keeps_order_and_is_strict_json():
    ledger = Ledger()
    ledger.skip(
        7,
        rows=[("books", 3), ("web", 9)],
        loss=math.nan,
        grad_norm=np.float32(2.5),
        reason="loss not finite",
    )
    ledger.add(event="quarantine", step=5, hashes={"a": jnp.float32(1.5)})
    text = json.dumps(ledger.entries, allow_nan=False)
    again = Ledger(json.loads(text))
    assert again.entries == ledger.entries
    assert again.entries[0]["loss"] == "nan"
    assert again.entries[0]["rows"] == [["books", 3], ["web", 9]]
    assert again.select("quarantine")[0]["hashes"] == {"a": 1.5}
    assert again.skipped_steps == [7]
    assert [entry["event"] for entry in again.entries] == ["skip", "quarantine"]
    again.add(event="skip", step=8)
    assert len(ledger.entries) == 2


def test_an_entry_of_a_ledger_with_a_file_is_on_the_disk_when_it_is_made(tmp_path):
    path = tmp_path / "ledger.jsonl"
    assert read_ledger(path) == []
    ledger = Ledger(path=path)
    for step in (4, 7):
        ledger.skip(step, loss=math.inf, grad_norm=1.0, reason="loss not finite", rows=[("web", step)])
        assert read_ledger(path) == ledger.entries
    path.write_text(path.read_text() + '{"event": "sk')
    assert read_ledger(path) == ledger.entries
    path.write_text(path.read_text() + '{"event": "skip"}\n')
    with pytest.raises(ConfigError, match=r"ledger\.jsonl:3 must be a JSON object with an event and a step"):
        read_ledger(path)


def test_a_resumed_ledger_knows_what_lies_ahead_and_lacks_nothing(tmp_path):
    path = tmp_path / "ledger.jsonl"
    first = Ledger(path=path)
    for step in (2, 5, 8):
        first.skip(step, loss=math.nan, grad_norm=1.0, reason="loss not finite")
    first.add(event="quarantine", step=8, reason="flipped")
    of_checkpoint = Ledger(
        [first.entries[0], {"event": "quarantine", "step": 9, "reason": "on the way here"}]
    )
    ledger, ahead = of_checkpoint.resumed(read_ledger(path), 4, path)
    assert ahead == {5: first.entries[1], 8: first.entries[2]}
    assert ledger.entries == [*of_checkpoint.entries, first.entries[3]]
    assert read_ledger(path) == [*first.entries, of_checkpoint.entries[1]]


# --- hashes ------------------------------------------------------------------------------------------


def hash_in_numpy(array):
    """The leaf hash written out over the words of one array."""
    mask = 0xFFFFFFFF

    def mix(x):
        x = ((x ^ (x >> 16)) * 0x85EBCA6B) & mask
        x = ((x ^ (x >> 13)) * 0xC2B2AE35) & mask
        return x ^ (x >> 16)

    lane0 = lane1 = 0
    unsigned = array.view({1: np.uint8, 2: np.uint16, 4: np.uint32}[array.dtype.itemsize])
    for place, word in enumerate(unsigned.reshape(-1).tolist()):
        hashed = mix((word + place * 0x9E3779B1) & mask)
        lane0 = (lane0 + hashed) & mask
        lane1 = (lane1 + hashed * (hashed | 1)) & mask
    return lane0, lane1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "uint8", "int8", "bool"])
@pytest.mark.parametrize("shape", [(), (5,), (3, 4, 2), (2, 0)])
def test_leaf_hash_is_the_written_formula(dtype, shape):
    values = np.asarray(jax.random.normal(jax.random.key(0), shape) * 50)
    array = np.asarray(values > 0 if dtype == "bool" else jnp.asarray(values).astype(dtype))
    assert tuple(int(lane) for lane in health.leaf_hash(jnp.asarray(array))) == hash_in_numpy(
        np.atleast_1d(array)
    )


@given(st.integers(0, 8 * 16 - 1), st.integers(0, 31))
def test_one_flipped_bit_changes_lane_zero(element, bit):
    words = np.asarray(jax.random.bits(jax.random.key(1), (8, 16)))
    flipped = words.copy()
    flipped.reshape(-1)[element] ^= np.uint32(1 << bit)
    hashes = health.hash_leaves([jnp.asarray(words), jnp.asarray(flipped)])
    assert int(hashes[0][0]) != int(hashes[1][0])


def test_swapped_rows_and_swapped_leaves_change_the_fingerprint():
    a, b = jax.random.normal(jax.random.key(0), (2, 6, 4))
    swapped = a[jnp.asarray([1, 0, 2, 3, 4, 5])]
    prints = {
        health.tree_fingerprint(t) for t in ({"a": a, "b": b}, {"a": b, "b": a}, {"a": swapped, "b": b})
    }
    assert len(prints) == 3
    assert health.tree_fingerprint({"b": b, "a": a}) in prints
    assert re.fullmatch("[0-9a-f]{16}", health.tree_fingerprint({"a": a}))


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
def test_leaf_hash_is_the_same_on_every_mesh(kind):
    x = jax.random.normal(jax.random.key(0), (8, 12, 16))
    wanted = [int(lane) for lane in health.leaf_hash(x)]
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(kind, kind))
    for spec in [(), ("a",), ("a", "b"), (("a", "b"),), (None, "b", "a"), (None, None, ("b", "a"))]:
        placed = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
        assert [int(lane) for lane in health.hash_leaves([placed])[0]] == wanted, spec


def test_named_leaves_are_dotted_and_sorted_and_unique():
    tree = {"b": [1, 2], "a": {"x": 3}, "c": optax.ScaleState()}
    assert health.named_leaves(tree) == {"a.x": 3, "b.0": 1, "b.1": 2}
    with pytest.raises(AssertionError, match="both called"):
        health.named_leaves({"a": {"b": 1}, "a.b": 2})


# --- processes ---------------------------------------------------------------------------------------


def run_program(program, *arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        **options,
    )


def test_the_first_signal_sets_a_flag_and_handlers_come_back():
    former = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        assert not stop.requested
        assert not stop.requested_anywhere()
        os.kill(os.getpid(), signal.SIGTERM)
        deadline = time.monotonic() + 5
        while not stop.requested and time.monotonic() < deadline:
            time.sleep(0.001)
        assert stop.received == "SIGTERM"
        assert stop.requested_anywhere()
    assert signal.getsignal(signal.SIGTERM) is former


STOPPING = """
import time
from pretrain.health import StopSignal
with StopSignal() as stop:
    print("ready", flush=True)
    while not stop.requested:
        time.sleep(0.01)
    print("saving", flush=True)
    time.sleep(SAVING_S)
print("saved", flush=True)
"""


def asked_to_stop(number, saving_s):
    """A process that has heard its first signal and saves."""
    child = run_program(STOPPING.replace("SAVING_S", str(saving_s)))
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    child.send_signal(number)
    assert child.stdout.readline() == "saving\n"
    return child


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_further_sigterms_leave_the_save_alone(first):
    child = asked_to_stop(first, saving_s=2)
    for _ in range(3):
        child.send_signal(signal.SIGTERM)
        time.sleep(0.1)
    output, errors = child.communicate(timeout=30)
    assert child.returncode == 0, errors
    assert output == "saved\n"
    assert errors.count("SIGTERM again: still saving") == 3


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_a_sigint_after_a_signal_stops_at_once(first):
    child = asked_to_stop(first, saving_s=60)
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=30)
    assert child.returncode == -signal.SIGINT
    assert "to stop at once" in errors


def test_a_hang_dumps_stacks_and_exits_5_but_slow_steps_and_patience_do_not(tmp_path):
    child = run_program(
        """
        import sys, time
        from pathlib import Path
        from pretrain.health import Watchdog
        def stuck_in_the_loader():
            time.sleep(60)
        with Watchdog(min_limit_s=0.5, factor=8, startup_limit_s=20, report=Path(sys.argv[1])) as dog:
            time.sleep(0.8)  # compiling
            for step in range(4):
                time.sleep(0.2)
                dog.beat(step)
            time.sleep(1.0)  # slow, yet below 8 medians
            dog.beat(4)
            with dog.patience(10):
                time.sleep(2.0)
            dog.beat(5)
            assert 1.2 < dog.limit_s < 3.0, dog.limit_s  # neither evaluation nor compilation entered the median
            print("fine so far", flush=True)
            stuck_in_the_loader()
        """,
        str(tmp_path / "stacks.txt"),
    )
    output, errors = child.communicate(timeout=60)
    assert output == "fine so far\n"
    assert child.returncode == 5, errors
    for text in (errors, (tmp_path / "stacks.txt").read_text()):
        assert "after step 5" in text
        assert "stuck_in_the_loader" in text


def test_a_process_that_was_stopped_is_not_a_hang():
    """As Ctrl-Z and a suspended laptop do."""
    child = run_program(
        """
        import os, time
        from pretrain.health import Watchdog
        with Watchdog(min_limit_s=0.4, factor=1) as dog:
            for step in range(30):
                print(step, flush=True)
                time.sleep(0.1)
                dog.beat(step)
        """
    )
    assert child.stdout.readline() == "0\n"
    child.send_signal(signal.SIGSTOP)
    time.sleep(2.5)
    child.send_signal(signal.SIGCONT)
    output, errors = child.communicate(timeout=60)
    assert child.returncode == 0, errors
    assert output.split()[-1] == "29"


def test_watchdog_ends_with_its_block():
    with Watchdog(min_limit_s=0.05, startup_limit_s=0.3) as dog:
        assert dog.limit_s == 0.3
        dog.beat(0)
        assert dog.limit_s == 0.3, "no step has been timed yet"
        dog.beat(1)
        assert dog.limit_s == 0.05
    time.sleep(0.5)  # a running watchdog would end the test session here
