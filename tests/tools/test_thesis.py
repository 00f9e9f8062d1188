"""The thesis page: stages are run as commands, joined by their files, and what is absent is said."""

import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from pretrain.config import apply_overrides, load_config, to_json
from pretrain.plots import Curve, Panel, draw
from tools import thesis
from tools.browse import find_browser, look
from tools.thesis import STAGES, arms_section, main, markdown_parts

PICTURE = draw([Panel(title="t", x_label="x", y_label="y", curves=[Curve(label="a", x=[0, 1], y=[1, 2])])])


def results(folder):
    folder.mkdir(parents=True)
    (folder / "results.md").write_text(
        "# Arms\n\n- a gate: passed\n\n| arm | all |\n|---|---|\n| raw & <b> | 25.0 |\n\nText.\n"
    )
    (folder / "results.png").write_bytes(PICTURE)


@pytest.fixture
def program(tmp_path, monkeypatch):
    """A stage whose command is a small module that writes results, slowly when told so."""
    (tmp_path / "stage_program.py").write_text(
        textwrap.dedent(
            """
            import pathlib, sys, time
            folder = pathlib.Path(sys.argv[3].partition("=")[2])
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / "started", "a") as file: file.write("x")
            print("working", flush=True)
            if (folder.parent / "slow").exists():
                time.sleep(60)
            if (folder.parent / "fail").exists():
                sys.exit(5)
            (folder / "results.md").write_text("| arm | all |\\n|---|---|\\n| raw | 25.0 |\\n")
            (folder / "results.png").write_bytes(pathlib.Path(__file__).with_name("picture.png").read_bytes())
            """
        )
    )
    (tmp_path / "picture.png").write_bytes(PICTURE)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{thesis.ROOT}")
    return dataclasses.replace(STAGES[0], module="stage_program", config="configs/pretrain/smoke.py")


def test_markdown_becomes_escaped_html():
    html = "".join(
        markdown_parts("# Title\n\n- one\n- two\n\n| a | b |\n|---|--:|\n| <i> | 2 |\n\nsome\ntext\n")
    )
    assert "<h3>Title</h3>" in html
    assert "<p>one</p><p>two</p>" in html
    assert "<td>&lt;i&gt;</td><td>2</td>" in html
    assert "<p>some text</p>" in html


def test_a_stage_is_run_recorded_and_shown(program, tmp_path, capsys):
    assert main(["--workdir", str(tmp_path / "t")], [program]) == 0
    assert "  working" in capsys.readouterr().out
    page = (tmp_path / "t/index.html").read_text()
    assert "<td>25.0</td>" in page
    assert "<img" in page
    record = json.loads((tmp_path / "t/entigraph.json").read_text())
    assert record["exit_code"] == 0
    assert record["seconds"] > 0
    assert record["origin"]["commit"] in page


def test_a_failed_stage_is_said_and_the_others_go_on(program, tmp_path):
    workdir = tmp_path / "t"
    workdir.mkdir()
    (workdir / "fail").touch()
    other = dataclasses.replace(program, key="other", title="Other")
    assert main(["--workdir", str(workdir)], [program, other]) == 1
    page = (workdir / "index.html").read_text()
    assert page.count("No results") == 2
    (workdir / "fail").unlink()
    assert main(["--workdir", str(workdir)], [program, other]) == 0
    assert "No results" not in (workdir / "index.html").read_text()


def test_a_stage_without_its_config_is_named(program, tmp_path, capsys):
    gone = dataclasses.replace(program, config="configs/nowhere.py")
    assert main(["--workdir", str(tmp_path / "t")], [gone]) == 1
    assert "configs/nowhere.py is not there" in capsys.readouterr().out


def test_the_page_alone_runs_nothing(program, tmp_path):
    results(tmp_path / "t/entigraph")
    assert main(["--workdir", str(tmp_path / "t"), "--report"], [program]) == 0
    assert not (tmp_path / "t/entigraph/started").exists()
    assert "a gate: passed" in (tmp_path / "t/index.html").read_text()


def test_an_unknown_stage_is_bad_input(tmp_path, capsys):
    assert main(["--workdir", str(tmp_path), "--only", "nonsense"]) == 2
    assert (
        "--only must name stages (entigraph, sbp, research, ladder), got nonsense" in capsys.readouterr().err
    )


def test_a_stage_does_not_outlive_a_killed_thesis(program, tmp_path):
    workdir = tmp_path / "t"
    workdir.mkdir()
    (workdir / "slow").touch()
    code = (
        "import dataclasses, sys; from tools.thesis import main, STAGES\n"
        "stage = dataclasses.replace(STAGES[0], module='stage_program', config='configs/pretrain/smoke.py')\n"
        f"main(['--workdir', {str(workdir)!r}], [stage])"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=thesis.ROOT, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (workdir / "entigraph/started").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(signal.SIGKILL)
    process.wait()
    while any(Path(f"/proc/{child}/cmdline").exists() and _alive(child) for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_stage_that_a_kill_left_behind_is_waited_for(program, tmp_path):
    """A stage in a long compile hears SIGTERM late: started again at once, it would be a second writer."""
    workdir = tmp_path / "t"
    workdir.mkdir()
    (tmp_path / "late_program.py").write_text(
        "import pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "folder = pathlib.Path(sys.argv[3].partition('=')[2])\n"
        "folder.mkdir(parents=True, exist_ok=True)\n"
        "assert not (folder / 'busy').exists(), 'two writers'\n"
        "(folder / 'busy').touch()\n"
        "time.sleep(3)\n"
        "(folder / 'busy').unlink()\n"
        "(folder / 'results.md').write_text('| arm | all |\\n|---|---|\\n| raw | 25.0 |\\n')\n"
        "(folder / 'results.png').write_bytes(pathlib.Path(__file__).with_name('picture.png').read_bytes())\n"
    )
    code = (
        "import dataclasses; from tools.thesis import main, STAGES\n"
        "stage = dataclasses.replace(STAGES[0], module='late_program', config='configs/pretrain/smoke.py')\n"
        f"main(['--workdir', {str(workdir)!r}], [stage])"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=thesis.ROOT, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (workdir / "entigraph/busy").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (workdir / "entigraph/busy").exists()
    lines = []
    stage = dataclasses.replace(program, module="late_program")
    assert thesis.run_stage(stage, workdir, lines.append) == 0, lines
    assert any("waiting for a process that is still in this stage" in line for line in lines)


def _alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.key)
def test_every_stage_names_a_verb_and_a_config_that_takes_its_folder(stage):
    module, flag, config, override = stage.command(Path("w"))
    assert importlib.util.find_spec(module)
    assert flag == "--config"
    changed = apply_overrides(load_config(thesis.ROOT / config), [override])
    assert str(Path("w") / stage.key) in json.dumps(to_json(changed))


@pytest.mark.slow
def test_a_browser_shows_the_page_without_a_word(program, tmp_path):
    browser = find_browser()
    if browser is None:
        pytest.skip("chromium is not installed")
    results(tmp_path / "t/entigraph")
    assert "<img" in arms_section(tmp_path / "t/entigraph")[0]
    main(["--workdir", str(tmp_path / "t"), "--report"], [program])
    console, sizes = look(tmp_path / "t/index.html", browser)
    assert console == []
    assert sizes
    assert all(width > 300 for width, _ in sizes)
