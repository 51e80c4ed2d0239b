"""What the codec in JAX takes on a machine: memory of a batch, and hours of a corpus."""

import re
from dataclasses import dataclass
from math import prod
from typing import Literal

import jax
import numpy as np

from llasa_jax.codec.xcodec2_jax import JaxCodec, Precision
from llasa_jax.codec.xcodec2_jax.weights import Weights, model_shapes
from llasa_jax.errors import UserError
from llasa_jax.plan.compiler import machine
from llasa_jax.plan.memory import is_out_of_memory
from llasa_jax.runtime.hardware import GPUS
from llasa_jax.speech.vocab import CODES_PER_SECOND

PASSES: dict[Precision, int] = {"float32": 6, "bfloat16_3x": 3, "bfloat16": 1}
Part = Literal["encoder", "decoder"]


@dataclass(frozen=True)
class CodecPlan:
    """What one part of the codec needs on one machine; sizes in GiB per device.

    `flops_per_second` are those of a second of speech. `hours_roofline` of `speech_hours` on all
    devices, None where the device's rate is not known, are what the products alone take at the
    device's peak rate.
    """

    part: Part
    topology: str
    device_count: int
    clips_per_device: int
    seconds: float
    fits: bool
    peak_hbm_gib: float
    hbm_gib: float | None
    flops_per_second: float
    speech_hours: float
    hours_roofline: float | None


def plan_codec(
    config,
    topology: str,
    part: Part = "encoder",
    speech_hours: float = 1000,
    clips: int = 16,
    seconds: float = 10,
    precision: Precision = "float32",
) -> CodecPlan:
    """Compiles a part of an `Xcodec2Config` for a batch of `clips` of `seconds` on each device.

    Raises `UserError` for a GPU, for which nothing can be compiled without one.
    """
    if topology.partition(":")[0].lower() in GPUS:
        raise UserError(
            f"the codec is not planned for {topology}, since it can be compiled for TPUs and for"
            " this machine alone; name a TPU slice such as v5e:2x2, or here"
        )
    devices, device = machine(topology, slices=1)
    codec = JaxCodec("plan", _without_values(config), devices[:1], precision)
    try:
        analysis = codec.compile(part, clips, seconds).memory_analysis()
        assert analysis  # every backend here gives one
        peak, fits = analysis.peak_memory_in_bytes / 2**30, True
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        sizes = re.findall(r"([\d.]+)G\)? (?:of|exceeds)", str(error))
        peak, fits = max(map(float, sizes), default=0.0), False
    flops = CODES_PER_SECOND * frame_flops(config, part, round(seconds * CODES_PER_SECOND))
    hours = None
    if device:
        hours = speech_hours * flops * PASSES[precision] / (device.flops * len(devices))
    return CodecPlan(
        part=part,
        topology=topology,
        device_count=len(devices),
        clips_per_device=clips,
        seconds=seconds,
        fits=fits and not (device and peak > device.memory),
        peak_hbm_gib=round(peak, 4),
        hbm_gib=device.memory if device else None,
        flops_per_second=flops,
        speech_hours=speech_hours,
        hours_roofline=hours,
    )


def frame_flops(config, part: Part, frames: int) -> float:
    """Floating-point operations of the products for one of a clip's `frames`, forward alone."""
    ratios, semantic = config.downsampling_ratios, config.semantic_model_config
    products = 0
    weights = _without_values(config)
    for name in weights.names_of(part):
        shape = weights.read(name).shape
        if len(shape) < 2:  # a bias or a norm
            continue
        steps = 1  # that the weight is applied to in a frame
        if block := re.match(r"acoustic_encoder\.block\.(\d+)\.(res_unit|conv1)", name):
            steps = prod(ratios[int(block[1]) + (block[2] == "conv1") :])
        elif name.startswith("acoustic_encoder.conv1"):
            steps = prod(ratios)
        elif name.endswith("distance_embedding.weight"):
            steps = semantic.num_attention_heads
        products += steps * prod(shape)
    layers, width = (
        (semantic.num_hidden_layers, semantic.hidden_size)
        if part == "encoder"
        else (config.num_hidden_layers, config.num_attention_heads * config.head_dim)
    )
    return 2.0 * (products + layers * 2 * frames * width)


def describe(plan: CodecPlan, price: float = 0.0) -> str:
    """The plan in words; `price` is that of a device-hour, 0 where it does not matter."""
    of = f" of {plan.hbm_gib:g}" if plan.hbm_gib else ""
    least = "" if plan.fits else "at least "
    lines = [
        f"{plan.part}: {'fits' if plan.fits else 'DOES NOT FIT'}: {plan.topology},"
        f" {plan.clips_per_device} clips of {plan.seconds:g} s on each of {plan.device_count}"
        f" devices; peak memory {least}{plan.peak_hbm_gib:.2f}{of} GiB",
        f"  {plan.flops_per_second / 1e9:.0f} GFLOPs for a second of speech",
    ]
    if plan.hours_roofline is not None:
        faster = plan.speech_hours / plan.hours_roofline
        lines.append(
            f"  {plan.speech_hours:g} hours of speech: at least {plan.hours_roofline:.2g} hours,"
            f" {faster:,.0f} times as fast as it is spoken, at the peak rate; half that is usual"
        )
        usual = 2 * plan.hours_roofline * plan.device_count
        cost = f", which cost {usual * price:,.0f} at {price:g} each" if price else ""
        lines.append(f"  about {usual:,.0f} device-hours at half the peak rate{cost}")
    return "\n".join(lines)


def _without_values(config) -> Weights:
    """The weights of a model that is not here: zeros that take no memory."""
    shapes = model_shapes(config)
    read = lambda name: np.broadcast_to(np.float32(0), shapes[name])  # noqa: E731
    return Weights(config, "", sorted(shapes), read)
