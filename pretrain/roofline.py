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


# TPU: the specification tables of the Cloud TPU pages "TPU v4", "TPU v5e", "TPU v5p", "TPU v6e" and "TPU7x (Ironwood)".
# They give peak, HBM and, of all ports in both directions together, the interconnect (v5e 400 GB/s, v5p 1200, v6e 800,
# 7x 1200). An axis of the mesh is taken to lie along one axis of the torus, which has a link each way: a quarter of it on
# v5e and v6e, a sixth on v5p and 7x. The v4 page gives none; its links are those of v5e in "How to scale your model"
# (jax-ml scaling book), which puts the links of all of them a tenth lower: 45 GB/s one way, 90 on v5p and v6e.
# Data center network per chip: 50 Gbit/s on v5p, 100 on v6e and 7x, 6.4 Tbit/s for a pod of 256 on v5e; that of v4 is
# taken from v5p. The compiler lists the two halves of a v4 or 7x chip as devices of their own: half of everything.
# HBM is what the compiler was seen to grant (v5e 15.75 GiB), a little less than the page's on v6e, else the page's.
# H100: the data sheet "NVIDIA H100 Tensor Core GPU", SXM part: 1,979 TFLOP/s with sparsity, hence half; 3.35 TB/s; NVLink
# 900 GB/s both ways. The adapter of 400 Gbit/s a GPU is that of DGX H100; other hosts have other ones.
CHIPS = (
    ("TPU v4", Chip(name="v4", peak_flops=137.5e12, hbm_bytes=16 * 2**30, hbm_bandwidth=0.6e12,
                    link_bandwidth=45e9, slow_bandwidth=3.125e9)),
    ("TPU v5 lite", Chip(name="v5e", peak_flops=197e12, hbm_bytes=15.75 * 2**30, hbm_bandwidth=0.819e12,
                         link_bandwidth=100e9, slow_bandwidth=3.125e9)),
    ("TPU v5", Chip(name="v5p", peak_flops=459e12, hbm_bytes=95 * 2**30, hbm_bandwidth=2.765e12,
                    link_bandwidth=200e9, slow_bandwidth=6.25e9)),
    ("TPU v6", Chip(name="v6e", peak_flops=918e12, hbm_bytes=31.25 * 2**30, hbm_bandwidth=1.638e12,
                    link_bandwidth=200e9, slow_bandwidth=12.5e9)),
    ("TPU7x", Chip(name="tpu7x", peak_flops=1153.5e12, hbm_bytes=96 * 2**30, hbm_bandwidth=3.69e12,
                   link_bandwidth=100e9, slow_bandwidth=6.25e9)),
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
