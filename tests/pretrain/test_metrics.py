"""Metric files survive kills, resumes drop what will be repeated, the clock adds up, progress reads well."""

import contextlib
import io
import json
import math
import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorboardX.proto.event_pb2 import Event

from pretrain import metrics
from pretrain.config import ConfigError


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


class Clock:
    """A clock that only moves when told."""

    def __init__(self):
        self.time_s = 100.0

    def __call__(self):
        return self.time_s


# --- JSONL -------------------------------------------------------------------------------------------


def test_what_is_written_is_read_back(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = metrics.JsonlWriter(path)
    writer.write(
        1, "train", {"loss": np.float32(2.5), "loss_by_source": {"a": 1.0, "ü": math.inf}, "note": "nan"}
    )
    writer.write(2, "train", {"loss": math.nan})
    writer.close()
    first, second = metrics.read_metrics(path)
    assert first == {
        "step": 1,
        "kind": "train",
        "loss": 2.5,
        "loss_by_source": {"a": 1.0, "ü": math.inf},
        "note": "nan",
    }
    assert math.isnan(second["loss"])
    # Strict JSON: other programs read the file too, and NaN is not JSON.
    json.loads(
        path.read_text().splitlines()[1], parse_constant=lambda name: pytest.fail(f"{name} in the file")
    )


@given(steps=st.lists(st.integers(0, 20), max_size=12), resume_step=st.none() | st.integers(0, 20))
def test_resume_keeps_exactly_the_steps_up_to_the_checkpoint(tmp_path_factory, steps, resume_step):
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": s, "kind": "train"}) + "\n" for s in steps))
    dropped = metrics.drop_after(path, resume_step)
    kept = [s for s in steps if resume_step is not None and s <= resume_step]
    assert [r["step"] for r in metrics.read_metrics(path)] == kept
    assert [r["step"] for r in dropped] == [s for s in steps if s not in kept]


@pytest.mark.parametrize("cut", range(1, 27))
def test_a_line_cut_at_any_byte_is_ignored_and_removed_on_resume(tmp_path, cut):
    path = tmp_path / "metrics.jsonl"
    line = b'{"step": 2, "kind": "train"}\n'
    path.write_bytes(b'{"step": 1, "kind": "train"}\n' + line[:cut])
    assert [r["step"] for r in metrics.read_metrics(path)] == [1]
    metrics.drop_after(path, 5)
    assert path.read_bytes() == b'{"step": 1, "kind": "train"}\n'


def test_a_file_with_nothing_to_drop_is_not_rewritten(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "kind": "train"}\n')
    before = path.stat()
    assert metrics.drop_after(path, 1) == []
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.parametrize("bad", ["{broken\n", '{"kind": "train"}\n', '{"step": "1"}\n', "[1]\n", "7\n"])
def test_a_damaged_line_is_named(tmp_path, bad):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + bad + '{"step": 3}\n')
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=r"metrics\.jsonl:2 must be a JSON object with an integer step"):
        metrics.drop_after(path, 9)
    assert path.read_bytes() == before


def test_every_line_written_before_a_kill_is_there(tmp_path):
    """SIGKILL leaves no time for a buffer: what `write` returned from must be in the file."""
    program = textwrap.dedent(
        """
        import sys
        from pretrain.metrics import JsonlWriter
        writer = JsonlWriter(sys.argv[1])
        for step in range(10**9):
            writer.write(step, "train", {"loss": 1.0, "text": "x" * 200})
            print(step, flush=True)
        """
    )
    path = tmp_path / "metrics.jsonl"
    with subprocess.Popen(
        [sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True
    ) as process:
        for _ in range(50):
            acknowledged = int(process.stdout.readline())
        os.kill(process.pid, signal.SIGKILL)
        acknowledged = max([acknowledged, *map(int, process.stdout.read().split("\n")[:-1])])
    steps = [r["step"] for r in metrics.read_metrics(path)]
    assert steps[: acknowledged + 1] == list(range(acknowledged + 1))


def test_a_folder_that_refuses_is_a_config_error(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(ConfigError, match="a part of the path is a file"):
        metrics.JsonlWriter(blocked / "metrics.jsonl")
    with pytest.raises(ConfigError, match="a part of the path is a file"):
        metrics.TensorBoardWriter(blocked / "tensorboard")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, a Linux device without space")
def test_a_full_disk_is_a_config_error():
    with pytest.raises(ConfigError, match="the disk is full"):
        metrics.JsonlWriter("/dev/full").write(1, "train", {"loss": 1.0})


# --- TensorBoard -------------------------------------------------------------------------------------


def events(folder):
    """The events of all files in the folder, read by the format's definition: length, crc, bytes, crc."""
    found = []
    for path in sorted(folder.glob("events.out.tfevents.*")):
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            found.append(Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
    return found


def test_tensorboard_gets_the_numbers_and_hides_what_a_resume_repeats(tmp_path):
    writer = metrics.TensorBoardConfig().build(tmp_path, config_json={}, resume_step=40)
    writer.write(41, "train", {"loss": 2.5, "loss_by_source": {"a": 1.0}, "note": "not a number"})
    writer.close()
    version, start, point = events(tmp_path / "tensorboard")
    assert version.file_version == "brain.Event:2"
    assert (start.session_log.status, start.step) == (1, 41)  # START: hide steps >= 41 of earlier files
    assert point.step == 41
    assert [(v.tag, v.simple_value) for v in point.summary.value] == [
        ("train/loss", 2.5),
        ("train/loss_by_source/a", 1.0),
    ]


def test_open_writers_drops_first_and_writes_everywhere(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 3}\n{"step": 4, "seconds": 9.0}\n')
    writers, dropped = metrics.open_writers(
        tmp_path, [metrics.TensorBoardConfig()], config_json={}, resume_step=3
    )
    writers.write(4, "eval", {"bits_per_byte": 2.0})
    writers.flush()
    writers.close()
    assert dropped == [{"step": 4, "seconds": 9.0}]
    assert lines(tmp_path / "metrics.jsonl") == [
        {"step": 3},
        {"step": 4, "kind": "eval", "bits_per_byte": 2.0},
    ]
    assert events(tmp_path / "tensorboard")[-1].summary.value[0].tag == "eval/bits_per_byte"


# --- goodput -----------------------------------------------------------------------------------------


@given(
    plan=st.recursive(
        st.floats(0, 10),
        lambda inner: st.tuples(st.sampled_from(metrics.PHASES), st.lists(inner, max_size=4)),
        max_leaves=20,
    ).flatmap(lambda item: st.just([item]))
)
def test_phases_add_up_to_wall_time_however_they_nest(plan):
    now = Clock()
    clock = metrics.GoodputClock(now=now)
    expected = dict.fromkeys(metrics.PHASES, 0.0)

    def play(items, phase):
        for item in items:
            if isinstance(item, float):
                now.time_s += item
                expected[phase] += item
            else:
                with clock.phase(item[0]):
                    play(item[1], item[0])

    play(plan, "other")
    assert clock.seconds() == pytest.approx(expected, abs=1e-9)
    assert clock.total_s() == pytest.approx(now.time_s - 100.0, abs=1e-9)


def test_the_clock_goes_on_after_a_restart_and_books_what_was_lost():
    now = Clock()
    clock = metrics.GoodputClock({"step": 30.0, "compile": 5.0}, now=now)
    clock.lose(
        [{"step": 8, "seconds": 38.0}, {"step": 9, "seconds": 40.0}, {"step": 9, "bits_per_byte": 2.0}]
    )
    with contextlib.suppress(KeyError), clock.phase("step"):
        now.time_s += 10.0
        raise KeyError  # time is booked even when the phase fails
    assert clock.seconds()["step"] == 40.0
    assert clock.total_s() == 50.0


def test_an_unknown_phase_is_refused():
    with (
        pytest.raises(ValueError, match="a goodput phase is one of .*; got 'steps'"),
        metrics.GoodputClock().phase("steps"),
    ):
        pass


# --- progress ----------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_log_gets_a_plain_line_at_the_start_every_ten_seconds_and_at_the_end():
    now, stream = Clock(), io.StringIO()
    with metrics.open_progress(num_steps=60, stream=stream, now=now) as progress:
        for step in range(1, 61):
            now.time_s += 0.5
            progress.update(step, loss=3.0 - step / 100, tokens_per_second=12345.6)
        progress.say("done")
    assert stream.getvalue().splitlines() == [
        "step 1/60  loss 2.9900  12,346 tokens/s  ETA –",
        "step 21/60  loss 2.7900  12,346 tokens/s  ETA 0:20",
        "step 41/60  loss 2.5900  12,346 tokens/s  ETA 0:10",
        "step 60/60  loss 2.4000  12,346 tokens/s  ETA 0:00",
        "done",
    ]


def test_a_terminal_gets_a_bar_and_lines_above_it(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    now, stream = Clock(), Terminal()
    with metrics.open_progress(num_steps=4, start_step=2, stream=stream, now=now) as progress:
        for step in (3, 4):
            now.time_s += 1.0
            progress.update(step, loss=2.0, tokens_per_second=1000.0)
            progress.say(f"[sample] after {step}")
    text = stream.getvalue()
    assert "━" in text
    assert "step 4/4" in text
    assert "loss 2.0000" in text
    assert "[sample] after 3" in text  # brackets are text here, not rich's markup


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (75, "1:15"), (3599.6, "1:00:00"), (3725, "1:02:05"), (math.inf, "–"), (math.nan, "–")],
)
def test_durations_read_like_a_clock(seconds, text):
    assert metrics.format_duration(seconds) == text
