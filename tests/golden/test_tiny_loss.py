"""The stored curve of the tiny model. A refactoring must not move it; `tools/golden.py` says more."""

import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def golden():
    spec = importlib.util.spec_from_file_location("golden_tool", ROOT / "tools" / "golden.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tiny_model_still_learns_along_the_stored_curve(golden):
    stored = json.loads((ROOT / "tests" / "golden" / "tiny_loss.json").read_text())
    curve = golden.tiny_curve()
    # Order of summation differs between processors and XLA versions: 1e-7 a step, which 50 steps amplify.
    for name, values in stored.items():
        np.testing.assert_allclose(curve[name], values, rtol=1e-5 if name == "loss" else 1e-4, err_msg=name)
    # The golden file itself is a run that learns: from chance towards the 3 equally likely continuations.
    assert stored["loss"][0] == pytest.approx(math.log(64), abs=0.3)
    assert stored["loss"][-1] < stored["loss"][0] - 1.0


def test_differences_show_a_changed_bit_and_a_changed_length(golden):
    old = {"loss": [1.0, 2.0]}
    assert golden.differences(old, {"loss": [1.0, 2.0]}) == []
    (line,) = golden.differences(old, {"loss": [1.0, np.nextafter(2.0, 3.0).item()]})
    assert line.startswith("step   2 loss")
    assert golden.differences(old, {"loss": [1.0]}) == ["loss has 2 values before, 1 after"]
