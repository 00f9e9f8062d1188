"""The run folder: writes are whole or absent, bad storage is one clear line, one writer at a time."""

import contextlib
import errno
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.config import ConfigError
from pretrain.rundir import (
    TEMPORARY_SUFFIX,
    RunDir,
    append_line,
    file_sha256,
    finished_lines,
    storage_error,
    write_atomic,
    write_json_atomic,
)


def test_write_atomic_replaces_whole_files_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    write_atomic(path, "one")
    write_atomic(path, b"two")
    assert path.read_bytes() == b"two"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_lines_are_appended_whole_and_what_a_kill_left_of_one_is_cut_off(tmp_path):
    path = tmp_path / "lines.jsonl"
    assert finished_lines(path) == []
    append_line(path, "one")
    append_line(path, "zwölf")
    assert finished_lines(path) == ["one", "zwölf"]
    path.write_bytes(path.read_bytes() + b"unfin")
    assert finished_lines(path) == ["one", "zwölf"]
    append_line(path, "three")
    assert path.read_text() == "one\nzwölf\nthree\n"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4, limits[1]))
    try:
        with pytest.raises(ConfigError, match="file size limit"):
            append_line(path, "four")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert finished_lines(path) == ["one", "zwölf", "three"]


def test_write_json_is_strict_json(tmp_path):
    write_json_atomic(tmp_path / "a.json", {"b": [1, 2.5, None]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"b": [1, 2.5, None]}
    with pytest.raises(ValueError, match="(?i)nan|out of range"):
        write_json_atomic(tmp_path / "a.json", {"loss": float("nan")})
    assert json.loads((tmp_path / "a.json").read_text()) == {"b": [1, 2.5, None]}


def test_a_refused_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    write_atomic(path, "old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(ConfigError, match="file size limit"):
            write_atomic(path, b"x" * 10_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_writer_killed_at_any_moment_leaves_the_old_file_or_the_new_one(tmp_path):
    path = tmp_path / "a.txt"
    program = (
        "import sys; from pretrain.rundir import write_atomic\n"
        "print('ready', flush=True)\n"
        "i = 0\n"
        "while True:\n"
        "    i += 1; write_atomic(sys.argv[1], str(i % 10) * 200_000)\n"
    )
    seen = set()
    for delay_s in (0.0, 0.003, 0.01, 0.03):
        child = subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE)
        assert child.stdout is not None
        child.stdout.readline()
        signal.sigtimedwait([], delay_s)
        child.kill()
        child.wait()
        child.stdout.close()
        if path.exists():
            text = path.read_text()
            assert len(text) == 200_000
            assert len(set(text)) == 1
            seen.add(text[0])
    assert seen, "no write finished in any of the tries"
    RunDir(tmp_path).create()
    assert not list(tmp_path.glob(f"*{TEMPORARY_SUFFIX}"))


def test_file_sha256_is_that_of_the_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert file_sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT, errno.EFBIG])
def test_storage_errors_are_found_in_causes_and_in_texts(number):
    plain = OSError(number, os.strerror(number))
    wrapped = RuntimeError("save failed")
    wrapped.__cause__ = plain
    told = ValueError(f"INTERNAL: write failed: {os.strerror(number)} [OS error {number}]")
    for error in (plain, wrapped, told):
        refused = storage_error(error, "/some/run")
        assert isinstance(refused, ConfigError)
        assert "/some/run" in str(refused)
        assert "\n" not in str(refused)
    assert storage_error(OSError(errno.EIO, "i/o"), "/some/run") is None
    assert storage_error(ValueError("bad shape"), "/some/run") is None


def test_paths_and_creation(tmp_path):
    run = RunDir(tmp_path / "a" / "b")
    run.create()
    assert run.root.is_dir()
    assert not list(run.root.iterdir())
    assert run.metrics_jsonl == tmp_path / "a" / "b" / "metrics.jsonl"
    assert run.checkpoints.parent == run.config_json.parent == run.summary_json.parent == run.root
    assert run.loss_png.name == "loss.png"
    assert run.samples_txt.name == "samples.txt"


def test_a_run_folder_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="choose another run.workdir"):
        RunDir(tmp_path / "file" / "run").create()
    with pytest.raises(ConfigError, match="choose another run.workdir"):
        RunDir(tmp_path / "file").create()
    assert (tmp_path / "file").read_text() == "x"


@pytest.fixture
def mounted(tmp_path):
    """A function that mounts something on a new folder; skips where this user may not mount."""
    points: list[Path] = []

    def mount(*commands: str) -> Path:
        point = tmp_path / f"mount{len(points)}"
        point.mkdir()
        for command in commands:
            done = subprocess.run(["mount", *command.format(point).split()], capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"this user may not mount: {done.stderr.strip()}")
            if point not in points:
                points.append(point)
        return point

    yield mount
    for point in points:
        subprocess.run(["umount", str(point)], check=True)


def test_a_read_only_run_folder_is_refused(mounted):
    point = mounted("--bind {0} {0}", "-o remount,ro,bind {0}")
    for root in (point, point / "deep" / "run"):
        with pytest.raises(ConfigError, match=r"Read-only file system.*choose another run\.workdir"):
            RunDir(root).create()
    with pytest.raises(ConfigError, match="Read-only"):
        RunDir(point).lock()


def test_a_full_disk_is_refused_and_leaves_no_folder(mounted):
    point = mounted("-t tmpfs -o size=64k none {0}")
    (point / "filler").write_bytes(b"x" * 60 * 1024)
    with pytest.raises(ConfigError, match="disk is full"):
        write_atomic(point / "a", b"y" * 8192)
    with contextlib.suppress(OSError), open(point / "filler", "ab", buffering=0) as file:
        while True:
            file.write(b"z" * 4096)
    with pytest.raises(ConfigError, match="disk is full"):
        RunDir(point / "run").create()
    assert sorted(p.name for p in point.iterdir()) == ["filler"]


def test_one_writer_at_a_time_and_a_dead_one_holds_nothing(tmp_path):
    run = RunDir(tmp_path)
    program = (
        "import sys, time; from pretrain.rundir import RunDir\n"
        "held = RunDir(sys.argv[1]).lock()\n"
        "print('held', flush=True); time.sleep(60)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    with pytest.raises(ConfigError, match=f"one writer.*process {child.pid} "):
        run.lock()
    child.kill()
    child.wait()
    child.stdout.close()
    run.lock().close()
    run.lock().close()
