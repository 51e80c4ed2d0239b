"""A Hugging Face checkpoint read as ours: each tensor straight into the shards that this host's
devices hold, or piece by piece.
"""

from collections import Counter
from collections.abc import Iterator
from functools import partial
from math import prod
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from llasa_jax.convert.names import check_names, our_shapes
from llasa_jax.convert.params_io import index_bounds
from llasa_jax.convert.safetensors_io import SafetensorsFolder, cast
from llasa_jax.model.config import ModelConfig

PIECE_BYTES = 64 << 20


class HfReader:
    """The parameters of a Hugging Face checkpoint's folder, by our paths. `dtypes` gives the stored
    type by path. Raises UserError for what is no such checkpoint.
    """

    def __init__(self, folder: Path, config: ModelConfig):
        self.checkpoint, self.config = SafetensorsFolder(folder), config
        found = {name: tensor.shape for name, tensor in self.checkpoint.tensors.items()}
        self.table = check_names(found, config, str(folder))
        self._names: dict[str, dict[int, str]] = {}
        for name, place in self.table.items():
            self._names.setdefault(place.path, {})[place.layer or 0] = name
        # Those in the checkpoint, of one layer: tables have no rows of padding.
        self.shapes = {path: self.table[names[0]].shape for path, names in self._names.items()}
        self.dtypes = {
            path: self.checkpoint.tensors[names[0]].dtype for path, names in self._names.items()
        }

    def original_dtypes(self) -> dict:
        """What an export goes back to: the checkpoint's type, and that of the parameters which have
        another. Part of a model's origin.
        """
        common = Counter(self.dtypes.values()).most_common(1)[0][0]
        others = {path: str(dtype) for path, dtype in self.dtypes.items() if dtype != common}
        return {"dtype": str(common), "other_dtypes": others}

    def pieces(self, path: str) -> Iterator[tuple[int, np.ndarray]]:
        """A layer, or some rows of a table, at a time. Tables come without rows of padding."""
        shape, names = our_shapes(self.config)[path], self._names[path]
        for layer, name in sorted(names.items()):
            tensor = self.checkpoint.tensors[name]
            if path.startswith("layers."):
                yield layer, self.checkpoint.read(name).reshape(1, *shape[1:])
                continue
            step = max(1, PIECE_BYTES * tensor.shape[0] // tensor.bytes)
            for start in range(0, tensor.shape[0], step):
                yield start, self.checkpoint.read(name, start, start + step)

    def onto(self, path: str, target: jax.ShapeDtypeStruct) -> jax.Array:
        """One parameter in the shards and the type of `target`.

        Beside what the devices hold, a host's memory takes one tensor's shards at a time. Hosts
        read only the rows that their devices hold; of rows that are split over hosts along their
        length, each reads all and keeps its part.
        """
        names, sharding = self._names[path], target.sharding
        if not path.startswith("layers."):
            return _load(self.checkpoint, names[0], target.shape, sharding, target.dtype)
        layer_sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
        empty = partial(jnp.zeros, target.shape, target.dtype)
        stack = jax.jit(empty, out_shardings=sharding)()
        for layer, name in sorted(names.items()):
            shape = target.shape[1:]
            part = _load(self.checkpoint, name, shape, layer_sharding, target.dtype)
            stack = _put(stack, part, layer)
        return stack


@partial(jax.jit, donate_argnums=0)
def _put(stack: jax.Array, layer: jax.Array, index: int) -> jax.Array:
    """Donated, so that the stack is filled where it lies."""
    return jax.lax.dynamic_update_index_in_dim(stack, layer, index, 0)


def _load(
    checkpoint: SafetensorsFolder, name: str, shape: tuple[int, ...], sharding: NamedSharding, dtype
) -> jax.Array:
    """One HF tensor in our `shape`, which splits its rows into heads or adds rows of zeros."""
    tensor = checkpoint.tensors[name]
    indices = sharding.addressable_devices_indices_map(shape).values()
    ours = {index_bounds(index, shape) for index in indices}
    shards = {box: np.zeros([stop - start for start, stop in box], dtype) for box in ours}
    # Rows of the tensor in one of ours: the width of a head, where heads are a dimension.
    hf_rows = max(1, tensor.shape[0] // shape[0])
    step = max(1, PIECE_BYTES // (hf_rows * prod(tensor.shape[1:]) * tensor.dtype.itemsize))
    for start in range(min(box[0][0] for box in ours), max(box[0][1] for box in ours), step):
        rows = checkpoint.read(name, start * hf_rows, (start + step) * hf_rows).reshape(
            -1, *shape[1:]
        )
        for box, shard in shards.items():
            first, last = max(start, box[0][0]), min(start + len(rows), box[0][1])
            if first < last:
                part = rows[
                    (slice(first - start, last - start), *(slice(*side) for side in box[1:]))
                ]
                shard[first - box[0][0] : last - box[0][0]] = cast(part, shard.dtype)
    return jax.make_array_from_callback(
        shape, sharding, lambda index: shards[index_bounds(index, shape)]
    )
