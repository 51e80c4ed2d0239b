"""A tensor's checksum, the same on devices and in files, whole or in pieces, on any mesh.

    checksum = sum over i of (2 i + 1) * bits[i]   modulo 2^32

`i` is the element's index in row-major order and `bits[i]` its bits as an unsigned number. The
factors are odd, so every flipped bit changes the sum; they differ, so exchanged elements do too.
A sum does not depend on the order of its terms, so pieces and shards are summed where they lie.
Zeros add nothing and reshaping keeps the order: a table padded with rows of zeros and a matrix
whose rows are split into heads have the checksum of the Hugging Face tensor.
"""

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from llasa_jax.errors import UserError

BLOCK = 1 << 15  # elements at a time, so that the sums stay in the processor's cache
STACKED = "layers"  # a leaf below this key has a checksum for each index of its first dimension


def checksum(array: np.ndarray, start: int = 0) -> int:
    """The checksum of an array in memory; of a piece of a tensor where `start` is the index of its
    first element in the whole. The pieces' checksums add up to the whole's, modulo 2^32.
    """
    bits = np.ascontiguousarray(array).reshape(-1).view(f"u{array.dtype.itemsize}")
    # A block is a row. With i = k BLOCK + j, the sum over k comes first: two additions a block, of
    # rows (the sum of row[k]) and of their running sums from the last (the sum of k row[k]).
    rows, weighted = np.zeros((2, BLOCK), np.uint32)
    count = bits.size // BLOCK
    for block in bits[: count * BLOCK].reshape(count, BLOCK)[::-1]:
        weighted += rows
        rows += block
    rest = bits[count * BLOCK :].astype(np.uint32)
    factors = 2 * np.arange(BLOCK, dtype=np.uint32) + 1
    total = 2 * BLOCK * _sum(weighted) + 2 * start * _sum(rows) + _sum(rows * factors)
    total += 2 * (start + count * BLOCK) * _sum(rest) + _sum(rest * factors[: rest.size])
    return total % (1 << 32)


def _sum(values: np.ndarray) -> int:
    return int(values.sum(dtype=np.uint32))


def checksums(tree) -> dict[str, list[int]]:
    """The checksums of all arrays in a tree, by their path ("layers.q", "0.mu.embed"): one number,
    or one for each layer of what lies below `layers`.

    Arrays lie on any mesh, of one host or of many (then every host must call this). Their elements
    have 1, 2 or 4 bytes. Computed on the devices; what lies in a host's pinned memory is copied to
    them, one array at a time.
    """
    sums = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        keys = jax.tree_util.keystr(path, simple=True, separator=".")
        sharding = getattr(leaf, "sharding", None)
        if sharding and sharding.memory_kind == "pinned_host":
            leaf = jax.device_put(leaf, sharding.with_memory_kind("device"))
        stacked = STACKED in keys.split(".")
        if (
            sharding
            and {device.platform for device in sharding.device_set} == {"cpu"}
            and leaf.is_fully_replicated
        ):
            # XLA does not vectorise these products on the CPU: NumPy is five times as fast.
            sums[keys] = [checksum(x) for x in np.asarray(leaf)] if stacked else checksum(leaf)
        else:
            sums[keys] = _device_checksum(leaf, stacked)
    # One wait for all: the sums above were only queued.
    return {name: np.asarray(value).reshape(-1).tolist() for name, value in sums.items()}


@partial(jax.jit, static_argnums=1)
def _device_checksum(array: jax.Array, stacked: bool) -> jax.Array:
    """uint32 [L] of a stack, else []. XLA fuses the factors into the sum: nothing is stored."""
    array = jnp.asarray(array)
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(array, f"uint{8 * array.dtype.itemsize}")
    bits = bits.astype(jnp.uint32)
    axes = tuple(range(int(stacked), array.ndim))
    index, stride = jnp.zeros(array.shape, jnp.uint32), 1
    for axis in reversed(axes):
        along = jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
        index, stride = index + along * np.uint32(stride % (1 << 32)), stride * array.shape[axis]
    return jnp.sum((2 * index + 1) * bits, axis=axes, dtype=jnp.uint32)


def compare(found: Mapping[str, list[int]], expected: Mapping[str, list[int]], where) -> None:
    """UserError that names `where` and the first tensor of `found` whose checksum is not the
    expected one. A tensor without an expected checksum is not compared.
    """
    for name, sums in found.items():
        known = expected.get(name)
        if known is None or known == sums:
            continue
        wrong = [i for i, (a, b) in enumerate(zip(sums, known, strict=False)) if a != b]
        layer = f" of layer {wrong[0]}" if wrong and len(known) > 1 else ""
        raise UserError(
            f"{where} is damaged: the checksum of {name}{layer} is not the one that was saved; use"
            " another copy or another checkpoint"
        )


def all_finite(tree) -> bool:
    """Whether no number of a tree of arrays is infinite or nan."""
    return bool(jax.device_get(_finite(tree)))


@jax.jit
def _finite(tree) -> jax.Array:
    leaves = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]
    return jnp.all(jnp.stack(leaves))
