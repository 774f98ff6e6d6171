"""What chips can do, as published: arithmetic, memory, links to each other; by JAX's name of the device.

The peak of arithmetic is in bfloat16, without sparsity. A chip that is not here has none until `peak_flops` is set, to
what `benchmarks/ceiling.py` measures; nor has any in float32, whose products are put together from several passes. The
other numbers serve `daajax.planning` alone. A new chip is a line in `CHIPS`.
"""

import collections
from collections.abc import Sequence
from typing import Any, NamedTuple


class Chip(NamedTuple):
    """A kind of chip.

    Attributes:
        flops: Peak of one chip, bfloat16 operands, FLOP/s.
        bandwidth: Of its memory, bytes/s.
        link: Into it from the chips it is wired to, over all its links together, bytes/s one way; 0: none.
        cores: TensorCores of a TPU chip, which JAX may show as one device or as one each; 1 for others.
        network: Into it from GPUs of other hosts, or TPUs of other slices, bytes/s; 0: the links reach every chip.
    """

    flops: float
    bandwidth: float
    link: float
    cores: int = 1
    network: float = 0.0


# TPUs: "Peak compute", "HBM bandwidth" and "inter-chip interconnect bandwidth" per chip of
# https://docs.cloud.google.com/tpu/docs/v3, /v4, /v5e, /v5p, /v6e, /tpu7x; half of what is said of both directions.
# On a TPU7x each of the two TensorCores is a device. Both names that JAX has given a kind. Between slices: "data center
# network bandwidth" of the same pages, per chip, or of a pod over its 256 chips; of the others nothing is said there.
# GPUs: NVIDIA's data sheets of A100, H100, H200, B200 and L40S, whose FLOP/s with sparsity are twice these and whose
# NVLink is of both directions; PCIe where there is none. Between hosts one adapter a GPU as in NVIDIA's DGX: 200 Gbit/s
# beside an A100, 400 beside the others.
CHIPS = {
    "TPU v3": Chip(123e12, 900e9, 82e9, cores=2),
    "TPU v4": Chip(275e12, 1200e9, 300e9, cores=2),
    "TPU v5 lite": Chip(197e12, 819e9, 200e9, network=3.125e9),
    "TPU v5e": Chip(197e12, 819e9, 200e9, network=3.125e9),
    "TPU v5": Chip(459e12, 2765e9, 600e9, cores=2, network=6.25e9),
    "TPU v5p": Chip(459e12, 2765e9, 600e9, cores=2, network=6.25e9),
    "TPU v6 lite": Chip(918e12, 1640e9, 400e9, network=12.5e9),
    "TPU v6e": Chip(918e12, 1640e9, 400e9, network=12.5e9),
    "TPU7x": Chip(2307e12, 7380e9, 600e9, cores=2),
    "NVIDIA A100-SXM4-40GB": Chip(312e12, 1555e9, 300e9, network=25e9),
    "NVIDIA A100-SXM4-80GB": Chip(312e12, 2039e9, 300e9, network=25e9),
    "NVIDIA A100-PCIE-40GB": Chip(312e12, 1555e9, 32e9, network=25e9),
    "NVIDIA A100 80GB PCIe": Chip(312e12, 1935e9, 32e9, network=25e9),
    "NVIDIA H100 80GB HBM3": Chip(989e12, 3350e9, 450e9, network=50e9),
    "NVIDIA H100 PCIe": Chip(756e12, 2000e9, 64e9, network=50e9),
    "NVIDIA H200": Chip(989e12, 4800e9, 450e9, network=50e9),
    "NVIDIA B200": Chip(2250e12, 8000e9, 900e9, network=50e9),
    "NVIDIA L40S": Chip(362e12, 864e9, 32e9, network=50e9),
}


def chip_of(device: Any) -> tuple[Chip | None, float]:
    """The chip that a device is of, None if it is not known, and which share of it the device is."""
    chip = CHIPS.get(device.device_kind)
    # A device that does not say how many TensorCores it has is a chip.
    share = 1.0 if chip is None else getattr(device, "num_cores", chip.cores) / chip.cores
    return chip, min(share, 1.0)


class Peak(NamedTuple):
    """What devices can do together.

    Attributes:
        chips: How many they are; a device of an unknown kind is one.
        flops: FLOP/s of all of them; None: not known.
        words: Where the number is from, or why there is none.
    """

    chips: float
    flops: float | None
    words: str


def peak_of(devices: Sequence[Any], dtype: str, peak_flops: float | None = None) -> Peak:
    """The peak of devices of one kind.

    Args:
        devices: What the run computes on.
        dtype: Compute dtype.
        peak_flops: FLOP/s of a device where somebody knows better.
    """
    ((kind, count),) = collections.Counter(device.device_kind for device in devices).items()
    chip, share = chip_of(devices[0])
    chips = count * share
    if peak_flops is not None:
        return Peak(chips, count * peak_flops, f"peak_flops: {peak_flops:.4g} FLOP/s a device")
    if dtype != "bfloat16":
        return Peak(chips, None, f"no peak is published for products in {dtype}; measured or known, it is peak_flops")
    if chip is None:
        return Peak(chips, None, f"no peak is known of {kind}; measured or known, it is peak_flops")
    return Peak(chips, chips * chip.flops, f"{chip.flops:.4g} FLOP/s a chip of {kind}")
