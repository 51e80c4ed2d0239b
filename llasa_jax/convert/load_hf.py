"""An HF checkpoint straight onto a mesh: each tensor is read once, into the shards that this host's
devices hold.
"""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llasa_jax.convert.hf_config import model_config
from llasa_jax.convert.hf_files import CONFIG, read_json
from llasa_jax.convert.names import check_names
from llasa_jax.convert.safetensors_io import SafetensorsFolder, cast
from llasa_jax.model.sharding import abstract_params

PIECE_BYTES = 64 << 20


def load_params_from_hf(folder: Path, mesh: Mesh, dtype) -> dict:
    """Our parameter tree in `dtype`, sharded over `mesh`, from an HF checkpoint's folder. Raises
    UserError as `import_hf` does.

    Beside what the devices hold, a host's memory takes one tensor's shards at a time. Hosts read
    only the rows that their devices hold; of rows that are split over hosts along their length,
    each reads all and keeps its part.
    """
    folder = Path(folder)
    config = model_config(read_json(folder / CONFIG), folder / CONFIG)
    checkpoint = SafetensorsFolder(folder)
    table = check_names(
        {name: tensor.shape for name, tensor in checkpoint.tensors.items()}, config, str(folder)
    )
    params = abstract_params(config, mesh, jnp.dtype(dtype))
    for name, place in table.items():
        *above, leaf = place.path.split(".")
        tree = params[above[0]] if above else params
        target = tree[leaf]
        if place.layer is None:
            tree[leaf] = _load(checkpoint, name, target.shape, target.sharding, target.dtype)
            continue
        if isinstance(target, jax.ShapeDtypeStruct):
            target = jax.jit(
                partial(jnp.zeros, target.shape, target.dtype), out_shardings=target.sharding
            )()
        layer_sharding = NamedSharding(mesh, PartitionSpec(*target.sharding.spec[1:]))
        tree[leaf] = _put(
            target,
            _load(checkpoint, name, target.shape[1:], layer_sharding, target.dtype),
            place.layer,
        )
    return params


@partial(jax.jit, donate_argnums=0)
def _put(stack: jax.Array, layer: jax.Array, index: int) -> jax.Array:
    """Donated, so that the stack is filled where it lies."""
    return jax.lax.dynamic_update_index_in_dim(stack, layer, index, 0)


def _load(
    checkpoint: SafetensorsFolder, name: str, shape: tuple[int, ...], sharding: NamedSharding, dtype
) -> jax.Array:
    """One HF tensor in our `shape`, which splits its rows into heads or adds rows of zeros."""

    def bounds(index: tuple[slice, ...]) -> tuple[tuple[int, int], ...]:
        return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))

    tensor = checkpoint.tensors[name]
    ours = {bounds(index) for index in sharding.addressable_devices_indices_map(shape).values()}
    shards = {box: np.zeros([stop - start for start, stop in box], dtype) for box in ours}
    hf_rows = max(
        1, tensor.shape[0] // shape[0]
    )  # in one of our rows: the head's width, where it has been split off
    step = max(1, PIECE_BYTES // (hf_rows * int(np.prod(tensor.shape[1:])) * tensor.dtype.itemsize))
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
    return jax.make_array_from_callback(shape, sharding, lambda index: shards[bounds(index)])
