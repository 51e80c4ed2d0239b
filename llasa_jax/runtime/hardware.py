"""What the devices that people rent can do, as far as a plan needs it."""

import re
from dataclasses import dataclass

from llasa_jax.errors import UserError


@dataclass(frozen=True)
class Device:
    """One JAX device: dense bfloat16 FLOP/s, GiB of memory that a program may fill, bytes a second
    to memory, and between devices.

    `link` is what one device receives when many gather at once, all its links together. Numbers are
    the vendors' data sheets; TPU links are those of "How To Scale Your Model"
    (jax-ml.github.io/scaling-book). Slices are the usual shapes of a TPU generation, ascending.
    """

    flops: float
    memory: float
    bandwidth: float
    link: float
    slices: tuple[str, ...] = ()
    devices_per_chip: int = 1


_2D = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_3D = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
TPUS = {
    "v4": Device(137.5e12, 15.5, 0.61e12, 135e9, _3D, 2),
    "v5e": Device(197e12, 15.75, 0.82e12, 180e9, _2D),
    "v5p": Device(459e12, 95.0, 2.77e12, 540e9, _3D),
    "v6e": Device(918e12, 31.25, 1.64e12, 360e9, _2D),
    "tpu7x": Device(1153.5e12, 94.75, 3.69e12, 270e9, _3D, 2),
}
GPUS = {
    "a100": Device(312e12, 74.0, 2.04e12, 300e9),
    "a100-40": Device(312e12, 36.0, 1.56e12, 300e9),
    "h100": Device(989e12, 74.0, 3.35e12, 450e9),
    "h200": Device(989e12, 132.0, 4.8e12, 450e9),
    "b200": Device(2250e12, 168.0, 8.0e12, 900e9),
    "l4": Device(121e12, 21.0, 0.30e12, 32e9),
    "l40s": Device(362e12, 42.0, 0.86e12, 32e9),
    "rtx3090": Device(71e12, 22.0, 0.94e12, 32e9),
    "rtx4090": Device(165e12, 22.0, 1.01e12, 32e9),
}
# By the start of a JAX device's `device_kind`; the longest match holds.
_KINDS = {
    # Where there is one, both cores of a chip are one device; the compiler without a TPU takes them
    # for two.
    "TPU v4": Device(275e12, 31.0, 1.23e12, 270e9),
    "TPU v5 lite": TPUS["v5e"],
    "TPU v5e": TPUS["v5e"],
    "TPU v5": TPUS["v5p"],
    "TPU v6": TPUS["v6e"],
    "TPU7x": TPUS["tpu7x"],
    "NVIDIA A100": GPUS["a100"],
    "NVIDIA A100-PCIE-40GB": GPUS["a100-40"],
    "NVIDIA A100-SXM4-40GB": GPUS["a100-40"],
    "NVIDIA H100": GPUS["h100"],
    "NVIDIA H100 PCIe": Device(756e12, 74.0, 2.0e12, 32e9),
    "NVIDIA H200": GPUS["h200"],
    "NVIDIA B200": GPUS["b200"],
    "NVIDIA L4": GPUS["l4"],
    "NVIDIA L40S": GPUS["l40s"],
    "NVIDIA GeForce RTX 3090": GPUS["rtx3090"],
    "NVIDIA GeForce RTX 4090": GPUS["rtx4090"],
}


def device_of_kind(device_kind: str) -> Device | None:
    """What is known of a JAX device by its `device_kind`, None of CPUs and the like."""
    matches = [kind for kind in _KINDS if device_kind.startswith(kind)]
    return _KINDS[max(matches, key=len)] if matches else None


def known_topologies() -> str:
    """All that `parse_topology` knows, as one sentence's end."""
    tpus = "; ".join(f"{name}:{', '.join(device.slices)}" for name, device in TPUS.items())
    return (
        f"TPU slices {tpus} and other shapes that the compiler takes; GPUs {', '.join(GPUS)} with a"
        " count, as in h100:8"
    )


def parse_topology(name: str) -> tuple[str, Device, int | None]:
    """Generation, device and, for GPUs, how many there are (None for a TPU slice). UserError,
    listing the known, on another name.
    """
    kind, _, shape = name.lower().partition(":")
    if kind in TPUS and re.fullmatch(r"\d+x\d+(x\d+)?", shape):
        return kind, TPUS[kind], None
    if kind in GPUS and re.fullmatch(r"[1-9]\d*|", shape):
        return kind, GPUS[kind], int(shape or 1)
    raise UserError(f"the topology {name} is not known; known are {known_topologies()}")
