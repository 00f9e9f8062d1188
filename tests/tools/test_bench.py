"""One table of ratios: each benchmark is a command, what has ended is not run again, what is absent has its reason."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from tools import bench
from tools.bench import BENCHMARKS, Benchmark, Options, main, read_attention, read_generation, read_step

ROOT = Path(bench.__file__).parents[1]
PROGRAM = """
import json, pathlib, sys, time
report = pathlib.Path(sys.argv[1])
with open(report.with_suffix(".started"), "a") as file: file.write("x")
print("measuring", flush=True)
if (report.parent / "slow").exists():
    time.sleep(60)
if (report.parent / "fail").exists():
    sys.exit("error: a rule was broken")
pairs = int((report.parent / "pairs").read_text()) if (report.parent / "pairs").exists() else 5
row = {"what": "adding", "ours": "ours", "peer": "theirs", "ratio_of": "speed", "median": 1.25, "least": 0.5,
       "greatest": 2.0, "pairs": pairs, "note": "a note"}
report.write_text(json.dumps({"rows": [row], "left_out": {"a peer": "it is not installed"}}))
"""


def adding(name="adding", **changes):
    """A benchmark whose command is the small program above."""
    benchmark = Benchmark(
        name=name,
        absent=lambda options: None,
        command=lambda options, report: ["bench_program", str(report)],
        read=bench.read_peers,
    )
    return dataclasses.replace(benchmark, **changes)


@pytest.fixture
def out(tmp_path, monkeypatch):
    """The program on the path; the folder of the results."""
    (tmp_path / "bench_program.py").write_text(textwrap.dedent(PROGRAM))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def starts(out, name="adding"):
    path = out / f"{name}.report.started"
    return len(path.read_text()) if path.exists() else 0


def test_a_table_of_ratios_with_ranges_is_written_and_printed(out, capsys):
    assert main([f"out={out}"], [adding()]) == 0
    line = "| adding: ours | theirs | 1.25 [0.50..2.00] x speed | 5 | a note |"
    for text in (capsys.readouterr().out, (out / "bench.md").read_text()):
        assert line in text
        assert "adding, a peer left out: it is not installed" in text
    record = json.loads((out / "bench.json").read_text())["benchmarks"]["adding"]
    assert record["command"][0] == "bench_program"
    assert record["origin"]["commit"] in (out / "bench.md").read_text()


def test_what_has_ended_is_not_run_again_unless_asked_otherwise(out):
    for _ in range(2):
        assert main([f"out={out}"], [adding()]) == 0
    assert starts(out) == 1
    other = adding(command=lambda options, report: ["bench_program", str(report), "more"])
    assert main([f"out={out}"], [other]) == 0
    assert starts(out) == 2


def test_a_part_keeps_the_rest_of_the_table(out):
    benchmarks = [adding(), adding("second")]
    assert main([f"out={out}", "only=adding"], benchmarks) == 0
    assert "- second was left out: not asked for" in (out / "bench.md").read_text()
    assert main([f"out={out}", "only=second"], benchmarks) == 0
    assert (starts(out), starts(out, "second")) == (1, 1)
    assert (out / "bench.md").read_text().count("| adding: ours |") == 2


def test_a_failure_is_said_and_the_others_go_on(out, capsys):
    (out / "fail").touch()
    assert main([f"out={out}"], [adding(), adding("second", absent=lambda options: "no peer here")]) == 1
    page = (out / "bench.md").read_text()
    assert "- adding failed: exit code 1: a rule was broken" in page
    assert "- second was left out: no peer here" in page
    (out / "fail").unlink()
    assert main([f"out={out}"], [adding()]) == 0
    assert "failed" not in (out / "bench.md").read_text()


def test_fewer_pairs_than_asked_for_are_no_result(out):
    (out / "pairs").write_text("4")
    assert main([f"out={out}"], [adding()]) == 1
    assert not (out / "adding.json").exists()
    assert "theirs must be timed in 5 pairs, got 4" in (out / "bench.md").read_text()


def test_one_writer_at_a_time(out, capsys):
    with bench.RunDir(out).lock():
        assert main([f"out={out}"], [adding()]) == 2
    assert "has one writer" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a child with its parent")
def test_a_killed_bench_leaves_no_benchmark_behind_and_goes_on(out):
    (out / "slow").touch()
    code = (
        "from tools.bench import *\n"
        "b = lambda name: Benchmark(name=name, absent=lambda o: None, read=read_peers, command=lambda o, r: ['bench_program', str(r)])\n"
        f"main(['out={out}'], [b('first'), b('adding')])"
    )
    (out / "slow").unlink()
    assert main([f"out={out}"], [adding("first")]) == 0
    (out / "slow").touch()
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not starts(out):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(signal.SIGKILL)
    process.wait()
    while any(_alive(child) for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (out / "slow").unlink()
    assert main([f"out={out}"], [adding("first"), adding()]) == 0
    assert (starts(out, "first"), starts(out)) == (1, 2)


def _alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["pairs=4"], "pairs must be at least 5, or the ranges say nothing, got 4"),
        (["only=nonsense"], "only must name benchmarks (step_0.87m, step_10m, generation, pairing, sandbox, attention)"),
        (["peers=nowhere"], "a peer must be module:function, got 'nowhere'"),
        (["folder=nowhere"], "folder must hold a model with a config.json, got 'nowhere'"),
        (["piars=5"], "did you mean pairs?"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_code_2(arguments, fault, tmp_path, capsys):
    assert main([f"out={tmp_path / 'out'}", *arguments]) == 2
    assert fault in capsys.readouterr().err
    assert not (tmp_path / "out/bench.json").exists()


def test_what_this_machine_lacks_is_the_reason(monkeypatch):
    absent = {benchmark.name: benchmark.absent for benchmark in BENCHMARKS}
    monkeypatch.setattr(bench, "backend", lambda: "cpu")
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None if name == "torch" else name)
    assert absent["step_10m"](Options()) == (
        "torch not installed: pip install -e '.[peers]', or give peers=module:function"
    )
    assert "give folder=FOLDER" in absent["generation"](Options())
    assert "jax sees no GPU and no TPU (backend cpu)" in absent["attention"](Options())
    assert absent["step_10m"](Options(peers="a:b")) is None
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: name)
    assert absent["step_10m"](Options()) is None
    monkeypatch.setattr(bench, "backend", lambda: "gpu")
    assert absent["attention"](Options()) is None


def test_a_step_without_named_peers_is_beside_the_one_of_the_extra(tmp_path):
    step = next(benchmark for benchmark in BENCHMARKS if benchmark.name == "step_0.87m")
    assert "peers=tools.peer_transformers:gpt2_step" in step.command(Options(), tmp_path / "report.json")
    assert "peers=a:b" in step.command(Options(peers="a:b"), tmp_path / "report.json")


def test_jax_is_asked_in_a_process_of_its_own():
    assert bench.backend() == "cpu"


@pytest.mark.parametrize("benchmark", BENCHMARKS, ids=lambda benchmark: benchmark.name)
def test_every_command_is_one_of_ours_with_the_pairs_asked_for(benchmark, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "backend", lambda: "gpu")
    module, *arguments = benchmark.command(Options(pairs=40, peers="a:b"), tmp_path / "report.json")
    assert (ROOT / f"{module.replace('.', '/')}.py").is_file()
    assert {"pairs=40", "samples=40"} & set(arguments)
    assert any(argument.startswith("out=") for argument in arguments)


def test_steps_are_read_and_a_peer_without_a_pair_is_refused(tmp_path):
    peer = {"name": "a:b", "our_speed": 1.5, "our_speed_range": [1.0, 2.0], "pairs": 7}
    report = {"shape": {"name": "10m"}, "dropped_blocks": 3, "entrants": [{"name": "ours"}, peer]}
    path = tmp_path / "step.json"
    path.write_text(json.dumps(report))
    (row,), left_out = read_step(path)
    assert (row.peer, row.median, row.least, row.greatest, row.pairs) == ("a:b", 1.5, 1, 2, 7)
    assert left_out == {}
    del peer["our_speed"]
    path.write_text(json.dumps(report))
    with pytest.raises(bench.ConfigError, match="a:b must be timed in a turn with ours"):
        read_step(path)


def test_generation_is_read_by_the_clock_and_by_the_processor(tmp_path):
    spread = {"median": 1.2, "least": 1.1, "greatest": 1.3}
    asked = {"folder": "models/small", "batch": 16, "new_tokens": 64, "prompt_tokens": 32, "pairs": 5}
    peer = {"our_speed": spread, "our_processor_speed": {**spread, "median": 1.4}, "same_ids_as_ours": 1.0}
    path = tmp_path / "generation.json"
    path.write_text(
        json.dumps({"options": asked, "entrants": {"ours:f": {"same_ids_as_ours": 1.0}, "peer:f": peer}})
    )
    rows, _ = read_generation(path)
    assert rows[0].what == "generation, small, 16 texts, 64 tokens after 32"
    assert [(row.median, row.note) for row in rows] == [
        (1.2, "by clock; 100.0% of ids the same"),
        (1.4, "by processor time; 100.0% of ids the same"),
    ]


def test_attention_is_read_case_by_case_and_what_is_wrong_is_left_out(tmp_path):
    case = {"direction": "fwd", "width": 64, "length": 4096, "packing": "causal", "samples": 20}
    ours = {**case, "impl": "pallas_hopper", "median_ms": 2.0, "quartiles_ms": [1.0, 4.0]}
    peer = {**case, "impl": "cudnn", "median_ms": 3.0, "quartiles_ms": [2.0, 8.0]}
    elsewhere = {**peer, "packing": "packed"}
    checks = [
        {"impl": "cudnn", "width": 64, "errors": {}, "wrong": []},
        {"impl": "tokamax", "width": 64, "absent": "not installed"},
        {"impl": "xla", "width": 64, "errors": {}, "wrong": ["packed dq"]},
    ]
    (tmp_path / "report").mkdir()
    (tmp_path / "report/attention.json").write_text(
        json.dumps(
            {"device": "a chip", "checks": checks, "table": [ours, peer, elsewhere], "left_out": [{}, {}]}
        )
    )
    (row,), left_out = read_attention(tmp_path / "report.json")
    assert (row.median, row.least, row.greatest, row.pairs) == (1.5, 0.5, 8.0, 20)
    assert left_out == {
        "tokamax, width 64": "not installed",
        "xla, width 64": "wrong: packed dq",
        "2 cases": "the time was up",
    }
