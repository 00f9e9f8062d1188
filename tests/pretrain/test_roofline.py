"""Laws of the predicted step: an interval from the largest part to the sum of all."""

import pytest

from pretrain.roofline import CHIPS, chip_of, predict


def test_chips_are_known_by_the_names_that_jax_gives():
    names = {"TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e", "NVIDIA H100 80GB HBM3": "h100"}
    for kind, name in names.items():
        chip = chip_of(kind)
        assert chip is not None
        assert chip.name == name
    assert chip_of("Nothing 1") is None


def test_the_interval_runs_from_the_largest_to_the_sum():
    chip = chip_of("TPU v5")
    assert chip is not None
    got = predict(
        chip,
        executed_flops=2 * chip.peak_flops,
        memory_bytes=0.5 * chip.hbm_bandwidth,
        sent_bytes={("fsdp",): chip.link_bandwidth, ("replica",): chip.slow_bandwidth * 3},
        slow_axes=frozenset({"replica"}),
    )
    assert got.compute_s == pytest.approx(2)
    assert got.links_s == pytest.approx({"fsdp": 1, "replica": 3})
    assert got.fastest_s == pytest.approx(3)
    assert got.slowest_s == pytest.approx(6.5)


def test_rates_of_every_chip_make_sense():
    for _, chip in CHIPS:
        assert chip.slow_bandwidth < chip.link_bandwidth < chip.hbm_bandwidth < chip.peak_flops
