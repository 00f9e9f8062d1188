"""Laws of compiling ahead: a report with every part, exit 1 where it does not fit, bad input in one line."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from pretrain.aot import AotConfig, abstract_batch, excess_bytes, memory_bytes, parse, table
from pretrain.config import ConfigError, load_config
from pretrain.flops import flops_per_token
from pretrain.sharding import make_mesh

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs/pretrain"
H100 = Path(os.environ.get("AUTODIDACT_DATA", ROOT.parent / "shared/data")) / "aot/h100_sxm.txtpb"
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the [tpu] extra is not installed"
)

# One layer of small, real shapes: every kernel and collective of the step, seconds of compiling.
SMALL = (
    "model.num_layers=2", "model.width=512", "model.num_heads=8", "model.num_kv_heads=4", "model.head_width=64",
    "model.hidden_width=1024", "data.row_length=512", "data.batch_rows=8", "run.num_microbatches=1",
    "data.tokenizer.vocab_size=8192",
)  # fmt: skip


def aot(config: str, *overrides: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pretrain.aot", "--config", str(CONFIGS / config), *overrides]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ((), "aot.topology must name what to compile for"),
        (("aot.topology=v9:2x2",), "aot.topology must be v4, v5e, v5p, v6e or tpu7x"),
        (("aot.topology=v5e",), "aot.topology must be v4, v5e, v5p, v6e or tpu7x"),
        (("aot.topolgy=v5e:2x2",), "did you mean aot.topology"),
        (("aot.topology=v5e:2x2", "aot.num_slices=0"), "aot.num_slices must be at least 1"),
        (("aot.topology=1x1x8", "aot.target_config=/nowhere"), "aot.target_config must name a file"),
        (("aot.topology=v5e:2x2", "run.num_stps=3"), "did you mean run.num_steps"),
    ],
)
def test_bad_input_is_one_clear_line(overrides, words):
    with pytest.raises(ConfigError, match=words) as error:
        parse(["--config", str(CONFIGS / "llama_1b.py"), *overrides])
    assert len(error.value.faults) == 1


def test_a_shape_for_gpus_is_not_one_of_a_tpu(tmp_path):
    target = tmp_path / "target.txtpb"
    target.write_text("")
    with pytest.raises(ConfigError, match="slices x hosts x GPUs"):
        AotConfig(topology="v5e:2x2", target_config=str(target))


def test_the_batch_has_the_shapes_of_the_config():
    config = load_config(CONFIGS / "llama_1b.py")
    batch = abstract_batch(config, make_mesh(config.mesh))
    B, T = config.data.batch_rows, config.data.row_length
    assert batch.tokens_BT1.shape == (B, T + 1)
    assert batch.weights_BT.shape == (B, T)
    assert batch.tokens_BT1.sharding.shard_shape(batch.tokens_BT1.shape) == (B // 8, T + 1)


def test_memory_traffic_counts_state_weights_and_temporaries():
    config = load_config(CONFIGS / "llama_1b.py")
    mesh = make_mesh(config.mesh)
    sizes = {"parameters": 1e9, "optimizer state": 2e9, "temporaries": 3e9}
    without = memory_bytes(config, mesh, {**sizes, "temporaries": 0.0})
    assert memory_bytes(config, mesh, sizes) - without == config.run.num_microbatches * 6e9


REPORT = {
    "topology": "v5e:2x2", "num_slices": 1, "device_kind": "TPU v5 lite", "num_devices": 4, "mesh": {"fsdp": 4},
    "params": 1.24e9, "batch_rows": 256, "row_length": 4096, "num_microbatches": 8, "remat": "full", "compile_s": 60.0,
    "fits": False,
    "hbm": {"by_kind_bytes": {"parameters": 2.0**30}, "used_bytes": 2.0**34, "capacity_bytes": 2.0**33, "free_bytes": -(2.0**33)},
    "flops": {"model_per_token": 8e9, "executed_per_token": 1.2e10},
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Ran out of memory in memory space hbm. Used 19.34G of 15.75G hbm. Exceeded", (19.34, 15.75)),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (45.92G) "
            "exceeds available HBM (15.75G).",
            (47.92, 15.75),
        ),
        ("INTERNAL: something else", None),
    ],
)
def test_the_compilers_words_say_by_how_much(text, expected):
    """Of temporaries alone it speaks when these do not fit by themselves; what is resident comes on top."""
    found = excess_bytes(text, resident_bytes=2 * 2.0**30)
    assert found == (None if expected is None else pytest.approx([x * 2**30 for x in expected]))


def test_the_table_says_by_how_much_it_does_not_fit():
    text = "\n".join(table(REPORT))
    assert "DOES NOT FIT, over by" in text
    assert "8,192" in text
    assert "1.50x" in text


@needs_libtpu
@pytest.mark.slow
def test_a_step_compiles_for_tpus_with_every_part_of_the_report(tmp_path):
    report_path = tmp_path / "report.json"
    done = aot(
        "llama_1b.py",
        "aot.topology=v5e:2x2",
        f"aot.report={report_path}",
        "mesh.fsdp=2",
        "mesh.tensor=2",
        *SMALL,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(report_path.read_text())
    assert report["fits"]
    kinds = report["hbm"]["by_kind_bytes"]
    assert kinds["parameters"] > 0
    assert kinds["temporaries"] > 0
    assert {"fsdp", "tensor"} <= {row["axes"] for row in report["collectives"]}
    assert {row["loops"] for row in report["collectives"]} == {"inside", "outside"}
    inside = [row for row in report["collectives"] if row["loops"] == "inside"]
    assert any(row["executions"] > row["instructions"] for row in inside)
    low, high = report["step_time"]["interval_s"]
    assert 0 < low < high
    assert "step time between" in done.stdout


# Config, topology and what of the config suits it: each is to fit, by the compiler's own count.
FITTING = [
    pytest.param(("moe_8x1b.py", "aot.topology=v5e:16x16"), id="experts on 256 v5e", marks=pytest.mark.pods),
    pytest.param(("llama_8b.py", "aot.topology=v5p:4x4x4"), id="8b on 64 v5p", marks=pytest.mark.slow),
    pytest.param(("llama_8b.py", "aot.topology=v6e:16x16"), id="8b on 256 v6e", marks=pytest.mark.pods),
    pytest.param(("llama_70b.py", "aot.topology=v5p:8x8x16"), id="70b on 1024 v5p", marks=pytest.mark.pods),
    pytest.param(
        ("llama_1b.py", "aot.topology=v5e:4x4", "aot.num_slices=2", "mesh.replica=2"),
        id="1b on two slices of 16 v5e",
        marks=pytest.mark.pods,
    ),
]


@needs_libtpu
@pytest.mark.parametrize("arguments", FITTING)
def test_configs_of_pods_compile_and_fit(arguments, tmp_path):
    done = aot(*arguments, f"aot.report={tmp_path / 'r.json'}")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["hbm"]["free_bytes"] > 0
    if report["num_slices"] > 1:  # nothing else goes over the slow network
        assert any("replica" in row["axes"] for row in report["collectives"])


@needs_libtpu
@pytest.mark.slow
def test_8b_does_not_fit_four_small_chips(tmp_path):
    done = aot(
        "llama_8b.py", "aot.topology=v5e:2x2", f"aot.report={tmp_path / 'r.json'}", "run.num_microbatches=128"
    )
    assert done.returncode == 1, done.stderr
    assert "DOES NOT FIT" in done.stdout
    assert not json.loads((tmp_path / "r.json").read_text())["fits"]


@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None or not H100.is_file(),
    reason="the [cuda] extra or the description of the target is not there",
)
@pytest.mark.pods
def test_1b_fits_eight_h100s_that_are_not_there(tmp_path):
    done = aot(
        "llama_1b.py", "aot.topology=1x1x8", f"aot.target_config={H100}", f"aot.report={tmp_path / 'r.json'}"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "r.json").read_text())["num_devices"] == 8


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("aot.topology=v5e:3x5",), "aot.topology must be one that the compiler knows"),
        (("aot.topology=v5e:2x2", "mesh.fsdp=3"), "mesh axes must multiply to the number of devices, 4"),
    ],
)
def test_a_topology_or_mesh_that_is_not_there_is_one_clear_line(overrides, words):
    done = aot("llama_1b.py", *overrides)
    assert done.returncode == 2
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert words in line


def test_model_flops_of_the_report_are_those_of_the_metrics():
    config = load_config(CONFIGS / "llama_1b.py")
    vocab_size = config.data.tokenizer.vocab_size
    # 6 N plus the causal half, by hand: 16 layers, 32 heads of 64, rows of 4096.
    matmul = 16 * (2048 * 64 * (64 + 16) + 3 * 2048 * 8192) + vocab_size * 2048
    assert flops_per_token(config.model, vocab_size, 4096) == 6 * matmul + 6 * 16 * 2048 * 4096
    assert jax.device_count() == 8
