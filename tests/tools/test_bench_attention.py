"""The benchmark refuses to time what is wrong, counts what is useful, and writes the table that it measured."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pretrain.config import ConfigError
from pretrain.kernels.attention import configs
from pretrain.kernels.attention.configs import HopperBlocks, TpuBlocks
from tools import bench_attention as bench
from tools import tune_attention as tune

SMOKE = bench.SIZES["smoke"]
XLA = bench.implementation("xla", bench.shapes_of(SMOKE, 32, 64, 1))


def test_a_right_implementation_is_admitted_and_a_wrong_one_is_not():
    right = bench.errors_against_float64(XLA, SMOKE, 32, "packed", seed=1)
    assert all(error < 1e-5 for error in right.values())
    off = bench.errors_against_float64(lambda *x: 1.01 * XLA(*x), SMOKE, 32, "packed", seed=1)
    assert off["o"] == pytest.approx(0.01, rel=0.01)
    causal_only = bench.errors_against_float64(
        lambda q, k, v, plan: XLA(q, k, v, None), SMOKE, 32, "packed", seed=1
    )
    assert causal_only["o"] > 0.1


def test_memory_is_poisoned_after_everything_is_compiled(monkeypatch):
    """What compiling takes and frees would be what the results are written to, and hold no NaN any more."""
    events = []

    def attend(q, k, v, plan):
        events.append("traced")
        return XLA(q, k, v, plan)

    def poison(like):
        events.append("poisoned")
        assert (1, 64, 4, 32) in {x.shape for x in jax.tree.leaves(like)}

    compile_job = bench.compile_job
    monkeypatch.setattr(bench, "compile_job", lambda *x: (compile_job(*x), events.append("compiled"))[0])
    monkeypatch.setattr(bench, "poison", poison)
    bench.errors_against_float64(attend, SMOKE, 32, "causal", seed=1)
    assert events[events.index("compiled") + 1 :] == ["traced", "poisoned", "poisoned"]


def test_what_does_not_compile_or_fails_is_a_line_and_stops_nothing_else(monkeypatch):
    def refuses(q, k, v, plan):
        raise RuntimeError("cuDNN is not detected.\nand much more")

    def groups(q, k, v, plan):
        raise ExceptionGroup("all failed", [ValueError("one"), ValueError("two")])

    def fails(q, k, v, plan):
        def stop(x):
            raise ValueError("out of something")

        o = jax.pure_callback(stop, q, jax.lax.stop_gradient(q))
        return XLA(q, k, v, plan) + o

    entrants = {"cudnn": refuses, "tokamax": groups, "tpu_interpret": fails}
    find = bench.implementation
    monkeypatch.setattr(
        bench,
        "implementation",
        lambda name, *x: bench.Entrant(entrants[name]) if name in entrants else find(name, *x),
    )
    admitted, rows = bench.admit(SMOKE, seed=1)
    assert list(admitted[32]) == ["xla"]
    absent = {row["impl"]: row["absent"] for row in rows if "absent" in row}
    assert absent["cudnn"] == "does not compile: RuntimeError: cuDNN is not detected."
    assert absent["tokamax"].startswith("does not compile: ExceptionGroup: all failed")
    assert absent["tpu_interpret"].startswith("fails: ")
    assert all("\n" not in bench.check_line(row) for row in rows)


def test_useful_work_is_the_allowed_pairs():
    case = bench.Case(direction="fwd", width=32, length=64, packing="causal")
    assert bench.useful_flops(bench.plan_of(SMOKE, case, 2), case, 3) == 4 * 3 * 32 * 2 * 64 * 65 / 2
    packed = bench.Case(direction="bwd", width=32, length=64, packing="packed")
    plan = bench.plan_of(SMOKE, packed, 1)
    lengths = np.unique(bench.segments(1, 64, SMOKE.median_document, 0), return_counts=True)[1]
    assert bench.useful_flops(plan, packed, 1) == 10 * 32 * sum(n * (n + 1) / 2 for n in lengths)


def test_entrants_take_turns_in_alternating_order():
    order = []
    runs = {name: (lambda name=name: order.append(name) or jnp.zeros(()), [()]) for name in "ab"}
    samples = bench.interleaved(runs, bench.Options(samples=4, warmup=1, min_sample_s=1e-9))
    assert {name: len(s) for name, s in samples.items()} == {"a": 4, "b": 4}
    assert order[-8:] == list("abbaabba")


@pytest.mark.slow
def test_the_smoke_run_leaves_table_and_pictures(tmp_path, capsys):
    argv = ["size=smoke", f"out={tmp_path}", "samples=2", "warmup=1", "min_sample_s=0.001", "input_sets=1"]
    assert bench.main(argv) == 0
    report = json.loads((tmp_path / "attention.json").read_text())
    assert {row["impl"] for row in report["table"]} == {"tpu_interpret", "xla"}
    assert {(row["direction"], row["packing"]) for row in report["table"]} == {
        (d, p) for d in ("fwd", "bwd") for p in ("causal", "packed")
    }
    assert {row["impl"]: row["absent"] for row in report["checks"] if "absent" in row}.keys() >= {"cudnn"}
    assert all(row["tflops"] > 0 for row in report["table"])
    assert (tmp_path / "attention_fwd.png").read_bytes().startswith(b"\x89PNG")
    assert "tpu_interpret" in capsys.readouterr().out


@pytest.mark.slow
def test_the_plan_is_a_small_part_of_a_step(tmp_path, capsys):
    argv = ["measure=plan", "size=smoke", f"out={tmp_path}", "samples=3", "warmup=1"]
    assert bench.main(argv) == 0
    report = json.loads((tmp_path / "plan.json").read_text())
    assert report["share_of_step"].keys() == {"plan", "prepared"}
    assert all(0 < share < 0.01 for share in report["share_of_step"].values())
    assert "2,048 tokens" in capsys.readouterr().out


@pytest.mark.parametrize("main", [bench.main, tune.main])
def test_bad_options_are_refused(main, capsys):
    assert bench.main(["measure=kernel"]) == 2
    assert "measure must be one of kernels, plan, got 'kernel'" in capsys.readouterr().err
    assert main(["size=giant"]) == 2
    assert "error: size must be one of h100, tpu, smoke, got 'giant'" in capsys.readouterr().err


def test_interpreted_tiles_never_reach_the_table_of_the_project(capsys):
    before = tune.TABLE.read_bytes()
    assert tune.main(["size=smoke"]) == 2
    assert "table must be a copy where kernels are interpreted" in capsys.readouterr().err
    assert tune.TABLE.read_bytes() == before


@pytest.mark.parametrize("chip", ["H200", "v5e"])
def test_a_row_of_the_table_is_rewritten_and_nothing_else(chip):
    text = tune.TABLE.read_text()
    name = "TPU_TABLE" if chip == "v5e" else "HOPPER_TABLE"
    if chip == "H200":
        blocks = HopperBlocks(block_q=128, block_k=64, stages=3, block_q_dq=64, block_k_dq=32, block_q_dkv=32,
                              block_k_dkv=64, stages_bwd=2)  # fmt: skip
    else:
        blocks = TpuBlocks(block_q=256, block_k=2048, block_q_dq=128, block_k_dq=64, block_q_dkv=32, block_k_dkv=16,
                           slice_k=8)  # fmt: skip
    old = getattr(configs, name)
    new = tune.rewritten(text, chip, 128, {False: blocks, True: old[chip, 128][True]})
    changed = [(a, b) for a, b in zip(text.splitlines(), new.splitlines(), strict=True) if a != b]
    assert len(changed) == 1
    scope = {}
    exec(compile(new, "configs.py", "exec"), scope)
    shown = {key: {packed: str(row) for packed, row in rows.items()} for key, rows in scope[name].items()}
    wanted = {key: {packed: str(row) for packed, row in rows.items()} for key, rows in old.items()}
    wanted[chip, 128][False] = str(blocks)
    assert shown == wanted


def test_every_row_of_the_table_is_found():
    """The sweep could not write a row whose text it does not recognize."""
    text = tune.TABLE.read_text()
    for (chip, width), rows in (*configs.HOPPER_TABLE.items(), *configs.TPU_TABLE.items()):
        assert tune.rewritten(text, chip, width, rows) == text
    with pytest.raises(ConfigError, match=r'one row \("H100", 96\), found 0'):
        tune.rewritten(text, "H100", 96, configs.HOPPER_TABLE["H100", 128])


def test_a_sweep_writes_the_rows_of_its_own_chip():
    assert tune.chip_of("pallas_hopper", "NVIDIA H200") == "H200"
    assert tune.chip_of("pallas_hopper", "NVIDIA H100 80GB HBM3") == "H100"
    assert tune.chip_of("pallas_tpu", "TPU v6 lite") == "v6e"
    with pytest.raises(ConfigError, match="one of H100, H200, got NVIDIA H20; add it to HOPPER_TABLE"):
        tune.chip_of("pallas_hopper", "NVIDIA H20")
    with pytest.raises(ConfigError, match="got TPU v4; add it to TPU_CHIPS and its rows to TPU_TABLE"):
        tune.chip_of("pallas_tpu", "TPU v4")


def test_forward_and_backward_blocks_are_chosen_apart():
    one, two = list(tune.tpu_candidates((8, 16), (8,)))[::3][:2]
    both = tune.joined(one, two)
    assert (both.block_q, both.block_k, both.slice_k) == (one.block_q, one.block_k, one.slice_k)
    assert both.tiles[1:] == two.tiles[1:]


@pytest.mark.parametrize("impl", ["pallas_hopper", "pallas_tpu"])
@pytest.mark.parametrize("width", [64, 128, 256])
def test_a_sweep_is_bounded_and_holds_no_candidate_twice(impl, width):
    found = tune.candidates(impl, width)
    assert 4 <= len(found) <= 24
    assert len(set(found)) == len(found)


@pytest.mark.slow
def test_the_smoke_sweep_writes_a_row_of_the_table(tmp_path):
    table, lines = tmp_path / "configs.py", []
    table.write_text(tune.TABLE.read_text())
    assert tune.main(["size=smoke", f"table={table}", "max_configs=1", "samples=1"], lines.append) == 0
    changed = [
        line
        for line, before in zip(
            table.read_text().splitlines(), tune.TABLE.read_text().splitlines(), strict=True
        )
        if line != before
    ]
    # A CPU is no chip of the table and takes the nearest row.
    assert len(changed) == 1
    assert changed[0].startswith('    ("v5e", 64): {False: _tpu((32, 32), (32, 32), (32, 32), 32), True: ')
