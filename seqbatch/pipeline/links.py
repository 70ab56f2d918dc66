"""What carries messages between devices."""

from typing import NamedTuple

__all__ = ["LINKS", "Link"]


class Link(NamedTuple):
    """What carries messages from one device to the next.

    Attributes:
        name: What it is.
        bandwidth: Bytes per second in one direction.
        latency: Seconds from send to receipt of an empty message, the launch of the transfer included.
        source: Where the numbers come from.
    """

    name: str
    bandwidth: float
    latency: float
    source: str


_NCCL = "latency: NCCL's tuning table (src/graph/tuning.cc, 2021), ring, Simple: 8.4 us per call and {} us per {} hop"
LINKS = {
    link.name: link
    for link in (
        Link("memory", 4.8e12, 0.3e-6,
             "bandwidth: NVIDIA H200 data sheet, HBM3e; latency: 400 to 600 cycles of a load, order of magnitude only"),
        Link("nvlink", 450e9, 11.8e-6,
             f"bandwidth: NVIDIA H100 data sheet, NVLink 4, 900 GB/s both ways; {_NCCL.format(3.4, 'NVLink')}"),
        Link("pcie", 64e9, 14.1e-6,
             f"bandwidth: PCIe 5.0 x16, 32 GT/s before encoding; {_NCCL.format(5.7, 'PCIe')}"),
        Link("infiniband", 50e9, 18.0e-6,
             f"bandwidth: InfiniBand NDR, 400 Gb/s, one adapter per device; {_NCCL.format(9.6, 'network')}"),
        Link("ethernet", 12.5e9, 50e-6,
             "bandwidth: 100 Gb/s Ethernet; latency: TCP from kernel to kernel, order of magnitude only"),
    )
}  # fmt: skip
"""Published peak bandwidths, which programs do not quite reach, and latencies."""
