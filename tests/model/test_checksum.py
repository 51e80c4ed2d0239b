"""A checksum is one number, wherever and however its tensor lies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llasa_jax.errors import UserError
from llasa_jax.model.checksum import BLOCK, checksum, checksums, compare

DTYPES = ("float32", "bfloat16", "float16", "int32", "int8")


def by_definition(array: np.ndarray) -> int:
    bits = array.reshape(-1).view(f"u{array.dtype.itemsize}").tolist()
    return sum((2 * i + 1) * b for i, b in enumerate(bits)) % 2**32


def random_array(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    values = np.random.default_rng(0).normal(size=shape) * 50
    return values.astype(jnp.dtype(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_numpy_and_jax_give_the_number_of_the_definition(dtype):
    array = random_array((5, 48, 16), dtype)
    expected = by_definition(array)
    assert checksum(array) == expected
    assert checksums({"a": jnp.asarray(array)}) == {"a": [expected]}
    by_layer = checksums({"mu": {"layers": {"q": jnp.asarray(array)}}})
    assert by_layer == {"mu.layers.q": [by_definition(layer) for layer in array]}


def test_pieces_add_up_to_the_whole_at_any_cut():
    array = random_array((3 * BLOCK + 17,), "bfloat16")
    for cut in (1, BLOCK - 1, BLOCK, 2 * BLOCK + 5):
        pieces = checksum(array[:cut]) + checksum(array[cut:], cut)
        assert pieces % 2**32 == checksum(array) == by_definition(array)


def test_an_index_beyond_32_bits_counts_modulo_its_size():
    array, start = random_array((1000,), "float32"), 2**33 + 12345
    bits = array.view(np.uint32).tolist()
    expected = sum((2 * (start + i) + 1) * b for i, b in enumerate(bits)) % 2**32
    assert checksum(array, start) == expected


@pytest.mark.parametrize("spec", [(), ("x",), ("y", "x"), (None, ("x", "y")), ("x", None, "y")])
def test_the_sharding_does_not_matter(spec):
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("x", "y"))
    array = random_array((8, 16, 8), "float32")
    tree = {"layers": {"q": array}, "embed": array}
    placed = jax.device_put(tree, NamedSharding(mesh, PartitionSpec(*spec)))
    assert checksums(placed) == {
        "layers.q": [checksum(layer) for layer in array],
        "embed": [checksum(array)],
    }


def test_rows_of_zeros_and_split_heads_do_not_matter():
    matrix = random_array((24, 16), "bfloat16")
    padded = np.concatenate([matrix, np.zeros((8, 16), matrix.dtype)])
    assert checksum(matrix) == checksum(padded) == checksum(matrix.reshape(3, 8, 16))


def test_every_flipped_bit_and_exchanged_rows_are_found():
    array = random_array((37, 8), "bfloat16")
    expected = checksum(array)
    raw = array.view(np.uint8)
    for byte in range(0, array.nbytes, 7):
        for bit in range(8):
            raw.reshape(-1)[byte] ^= 1 << bit
            assert checksum(array) != expected
            raw.reshape(-1)[byte] ^= 1 << bit
    assert checksum(array) == expected != checksum(array[::-1])


def test_a_difference_names_the_place_the_tensor_and_the_layer():
    expected = {"layers.v": [1, 2, 3], "embed": [4]}
    compare({"layers.v": [1, 2, 3]}, expected, "model/params")
    with pytest.raises(UserError, match="model/params is damaged: .* layers.v of layer 1"):
        compare({"layers.v": [1, 5, 3]}, expected, "model/params")
    with pytest.raises(UserError, match="checksum of embed is not"):
        compare({"embed": [5]}, expected, "model/params")
