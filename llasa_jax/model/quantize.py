"""Frozen weights in 8 or 4 bits: how they are kept, and how they become arrays again on their way
into the arithmetic.

"int8" has a scale for each output channel. "nf4" is QLoRA's 4-bit NormalFloat (arXiv:2305.14314,
appendix E): tiles of 64 weights share a scale, and two weights share a byte. A tile runs along the
last of a weight's output dimensions, for XLA's TPU compiler copies a whole stack of layers to
unpack tiles along its inputs, and bytes are 4 bits a weight on every platform.
"""

from dataclasses import dataclass, field
from math import gcd
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

TILE = 64
# The published values, ascending. A weight gets the nearest.
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Quantized:
    """A weight [..., out, *in] in few bits, `inputs` being the number of its input dimensions.
    Stacks of layers may be scanned over.

    int8: `q` int8 in the weight's shape, `scales` float32 with a 1 for each input dimension.
    nf4: `q` uint8 with half of `out`, weights i and i + 32 of a tile of 64 in a byte; `scales`
    bfloat16 with a number of tiles for `out`.
    """

    q: jax.Array
    scales: jax.Array
    inputs: int = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape."""
        packed = 1 if self.q.dtype == jnp.int8 else 2
        out = self.q.ndim - self.inputs - 1
        return (*self.q.shape[:out], packed * self.q.shape[out], *self.q.shape[out + 1 :])

    def dense(self, dtype) -> jax.Array:
        """The weight as an array again, computed in float32 and rounded to `dtype`."""
        scales = self.scales.astype(jnp.float32)
        if self.q.dtype == jnp.int8:
            return (self.q * scales).astype(dtype)
        tiles, out = _tiled(self.q, scales.shape[-self.inputs - 1], self.inputs)
        bits = tiles.astype(jnp.int32)
        values = jnp.concatenate([_nf4(bits & 15), _nf4(bits >> 4)], axis=out)
        weight = (values * jnp.expand_dims(scales, out)).astype(dtype)
        return weight.reshape(*weight.shape[: out - 1], -1, *weight.shape[out + 1 :])


def quantize(weight: jax.Array, kind: Literal["int8", "nf4"], inputs: int) -> Quantized:
    """A float weight [..., out, *in], with `inputs` input dimensions, in few bits: each value the
    nearest that its scale allows.
    """
    weight = weight.astype(jnp.float32)
    if kind == "int8":
        scales = _nonzero(jnp.max(jnp.abs(weight), axis=range(-inputs, 0), keepdims=True) / 127)
        return Quantized(jnp.round(weight / scales).astype(jnp.int8), scales, inputs)
    tiles, out = _tiled(weight, tile_count(weight.shape, inputs), inputs)
    scales = _nonzero(jnp.max(jnp.abs(tiles), axis=out, keepdims=True))
    borders = np.add(NF4[1:], NF4[:-1], dtype=np.float32) / 2
    bits = sum((tiles / scales > border).astype(jnp.uint8) for border in borders)
    low, high = jnp.split(bits, 2, axis=out)
    packed = low | high << 4
    shape = (*weight.shape[: out - 1], -1, *weight.shape[out:])
    return Quantized(packed.reshape(shape), scales.squeeze(out).astype(jnp.bfloat16), inputs)


def quantize_stack(stack: jax.Array, target: Quantized) -> Quantized:
    """A stack of layers [L, ...], which is used up, as `target` has it: its kind and its shardings.
    One layer at a time is in float32.
    """
    kind: Literal["int8", "nf4"] = "int8" if target.q.dtype == jnp.int8 else "nf4"

    def quantize_layers(stack):
        return jax.lax.map(lambda weight: quantize(weight, kind, target.inputs), stack)

    shardings = jax.tree.map(lambda leaf: leaf.sharding, target)
    quantised = jax.block_until_ready(jax.jit(quantize_layers, out_shardings=shardings)(stack))
    stack.delete()
    return quantised


def tile_count(shape: tuple[int, ...], inputs: int) -> int:
    """How many tiles a weight's last output dimension makes: of 64 weights, or of what divides a
    narrower one.
    """
    out = shape[-inputs - 1]
    return out // gcd(TILE, out)


def _tiled(x: jax.Array, count: int, inputs: int) -> tuple[jax.Array, int]:
    """`x` with its last output dimension as [count, tile], and where the tile then is."""
    out = x.ndim - inputs - 1
    return x.reshape(*x.shape[:out], count, -1, *x.shape[out + 1 :]), out + 1


def _nonzero(scales: jax.Array) -> jax.Array:
    return jnp.where(scales == 0, 1.0, scales)


def _nf4(codes: jax.Array) -> jax.Array:
    """The values of codes, chosen bit by bit: a table's look-up is slow on TPUs."""
    values = [jnp.float32(value) for value in NF4]
    for bit in range(4):
        is_set = (codes >> bit & 1).astype(bool)
        values = [
            jnp.where(is_set, high, low)
            for low, high in zip(values[::2], values[1::2], strict=True)
        ]
    return values[0]
