"""How fast a step could be on chips one does not have: compute, memory and links, each at its data-sheet rate.

The three overlap to an unknown degree, so the prediction is an interval: the largest of them when all overlaps, their
sum when nothing does. It holds for the dense rates of the sheets, which no program reaches in full.
"""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """Rates of one device as JAX lists devices."""

    name: str
    peak_flops: float  # bfloat16, dense, FLOP/s
    hbm_bytes: float
    hbm_bandwidth: float  # bytes/s
    link_bandwidth: float  # bytes/s that one device sends within a slice along one axis of the mesh
    slow_bandwidth: float  # bytes/s that one device sends to another slice or host


# TPU: peaks, HBM and links of "How to scale your model" (jax-ml scaling book, the table of TPU specs); an axis of the
# torus has a link each way. Data center network per chip as in the Cloud TPU pages: 50 Gbit/s on v4 and v5p, 25 on
# v5e, 100 on v6e and 7x. H100: NVIDIA data sheet of the SXM part (NVLink 900 GB/s both ways, one 400 Gbit/s adapter
# a GPU). HBM is what the compiler grants where it was seen to say so (v5e 15.75 GiB), else the sheet's.
CHIPS = (
    ("TPU v4", Chip(name="v4", peak_flops=275e12, hbm_bytes=32e9, hbm_bandwidth=1.2e12,
                    link_bandwidth=2 * 45e9, slow_bandwidth=6.25e9)),
    ("TPU v5 lite", Chip(name="v5e", peak_flops=197e12, hbm_bytes=15.75 * 2**30, hbm_bandwidth=0.81e12,
                         link_bandwidth=2 * 45e9, slow_bandwidth=3.125e9)),
    ("TPU v5", Chip(name="v5p", peak_flops=459e12, hbm_bytes=95 * 2**30, hbm_bandwidth=2.8e12,
                    link_bandwidth=2 * 90e9, slow_bandwidth=6.25e9)),
    ("TPU v6", Chip(name="v6e", peak_flops=918e12, hbm_bytes=31.25 * 2**30, hbm_bandwidth=1.6e12,
                    link_bandwidth=2 * 90e9, slow_bandwidth=12.5e9)),
    ("TPU7x", Chip(name="tpu7x", peak_flops=1153.5e12, hbm_bytes=96e9, hbm_bandwidth=3.7e12,
                   link_bandwidth=2 * 90e9, slow_bandwidth=12.5e9)),
    ("H100", Chip(name="h100", peak_flops=989.4e12, hbm_bytes=79.1 * 2**30, hbm_bandwidth=3.35e12,
                  link_bandwidth=450e9, slow_bandwidth=50e9)),
)  # fmt: skip


def chip_of(device_kind: str) -> Chip | None:
    """The chip whose name is part of `device_kind`; None when the table does not know it."""
    return next((chip for name, chip in CHIPS if name.lower() in device_kind.lower()), None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of a step on one chip, by what they are spent on."""

    compute_s: float
    memory_s: float
    links_s: Mapping[str, float]  # by mesh axes

    @property
    def fastest_s(self) -> float:
        """Everything overlaps; links of different axes too."""
        return max(self.compute_s, self.memory_s, *self.links_s.values())

    @property
    def slowest_s(self) -> float:
        """Nothing overlaps."""
        return self.compute_s + self.memory_s + sum(self.links_s.values())


def predict(
    chip: Chip,
    *,
    executed_flops: float,
    memory_bytes: float,
    sent_bytes: Mapping[tuple[str, ...], float],
    slow_axes: frozenset[str] = frozenset(),
) -> StepTime:
    """Times of a step from what one chip executes, moves and sends; `sent_bytes` by the mesh axes they go over.

    A collective over an axis in `slow_axes` goes at the slow rate.
    """
    links_s = {
        "+".join(axes): sent / (chip.slow_bandwidth if slow_axes & set(axes) else chip.link_bandwidth)
        for axes, sent in sent_bytes.items()
    }
    return StepTime(
        compute_s=executed_flops / chip.peak_flops,
        memory_s=memory_bytes / chip.hbm_bandwidth,
        links_s=links_s,
    )
