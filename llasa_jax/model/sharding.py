"""Where every array lives: one mesh, and one table from the model's alphabet to the mesh's axes.

`data` repeats the weights and splits the rows; `fsdp` splits both; `tensor` splits heads, MLP and
vocabulary. Only the table below names these axes; all other code takes them from it.
"""

from functools import partial
from math import prod
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from llasa_jax.errors import UserError
from llasa_jax.model.axes import INPUTS, LAYER_AXES, parameter_axes, sizes
from llasa_jax.model.config import AdapterConfig, ModelConfig, Quantization
from llasa_jax.model.quantize import Quantized, quantize

LAYER_MATRICES = tuple(name for name in LAYER_AXES if name in INPUTS)
MESH_AXES = ("data", "fsdp", "tensor")
ROW_AXES = ("data", "fsdp")  # the axes that split the rows of a batch
RULES = {
    "L": None,
    "V": "tensor",
    "D": "fsdp",
    "N": "tensor",
    "K": "tensor",
    "H": None,
    "F": "tensor",
    "R": None,
    "X": None,
    "B": None,
}

# What follows from the table.
ROWS = PartitionSpec(ROW_AXES)
HEADS = PartitionSpec(ROW_AXES, None, RULES["N"])  # queries, keys and values [B, T, N or K, H]
TABLE = PartitionSpec(RULES["V"], RULES["D"])
# How the loss splits the classes: over every device that does not merely repeat the weights.
VOCABULARY = tuple(axis for axis in TABLE if axis)
# Of the axes that split rows, those over which the weights are split as well: a group of devices
# along them gathers its rows, or its weights. The others repeat the weights.
GROUP = tuple(axis for axis in ROW_AXES if axis in VOCABULARY)
REPEATS = tuple(axis for axis in ROW_AXES if axis not in VOCABULARY)
# The axes along which devices have the same rows, and other parts of each layer.
LAYER_PARTS = tuple(axis for axis in MESH_AXES if axis not in ROW_AXES)


def mesh_sizes(data: int, fsdp: int, tensor: int, count: int) -> dict[str, int]:
    """The sizes of a mesh over `count` devices; at most one may be -1, "all that remain". UserError
    where they do not fit.
    """
    shape = [data, fsdp, tensor]
    named = dict(zip(MESH_AXES, shape, strict=True))
    if shape.count(-1) > 1 or any(n == 0 or n < -1 for n in shape):
        raise UserError(
            f"mesh sizes must be positive, with at most one -1 for the rest, but are {named}"
        )
    fixed = int(np.prod([n for n in shape if n != -1]))
    if count % fixed or (-1 not in shape and fixed != count):
        raise UserError(
            f"a mesh of {named} does not divide {count} devices; make the product of its sizes"
            f" {count}, or set one of them to -1"
        )
    return {axis: count // fixed if n == -1 else n for axis, n in named.items()}


def devices_along(mesh: Mesh | AbstractMesh, axes: tuple[str, ...]) -> int:
    """How many devices lie along some axes of a mesh."""
    return prod(mesh.shape[axis] for axis in axes)


def make_mesh(
    data: int = 1, fsdp: int = -1, tensor: int = 1, devices=None, slices: int = 1
) -> Mesh:
    """A (data, fsdp, tensor) mesh over `devices` (all by default), see `mesh_sizes`.

    With several `slices` (TPU slices, or GPU machines with a process each) only `data` goes from
    one to another: what lies between slices is slow, and `data` asks for it once a step.
    """
    devices = jax.devices() if devices is None else devices
    shape = tuple(mesh_sizes(data, fsdp, tensor, len(devices)).values())
    # Auto: the compiler places whatever the constraints of `MeshLayout` leave open.
    axis_types = (AxisType.Auto,) * len(MESH_AXES)
    if slices == 1:
        return jax.make_mesh(shape, MESH_AXES, axis_types=axis_types, devices=devices)
    if shape[0] % slices:
        raise UserError(
            f"mesh.data={shape[0]} is not a multiple of mesh.slices={slices}; each slice repeats"
            " the weights, so make it one"
        )
    of_slices = len({getattr(device, "slice_index", None) for device in devices}) > 1
    try:
        arranged = mesh_utils.create_hybrid_device_mesh(
            (shape[0] // slices, *shape[1:]),
            (slices, 1, 1),
            devices,
            process_is_granule=not of_slices,
        )
    except ValueError as error:
        raise UserError(
            f"mesh.slices={slices} does not match the {'slices' if of_slices else 'processes'} at"
            f" hand: {error}"
        ) from None
    return Mesh(arranged, MESH_AXES, axis_types=axis_types)


def row_devices(mesh: Mesh | AbstractMesh, rows: int = 0) -> int:
    """Over how many devices the rows of a batch are split. UserError where `rows` do not divide
    over them.
    """
    count = prod(mesh.shape[axis] for axis in ROWS[0])
    if rows % count:
        raise UserError(
            f"train.rows={rows} does not divide over mesh.data x mesh.fsdp = {count}; choose a"
            " multiple of it"
        )
    return count


def rows_here(sharding: NamedSharding, shape: tuple[int, ...]) -> list[int]:
    """Which rows of a batch [accumulation, rows, length] this process's devices hold, ascending."""
    indices = sharding.addressable_devices_indices_map(shape).values()
    return sorted({row for index in indices if index for row in range(*index[1].indices(shape[1]))})


def shares_rows(mesh: Mesh) -> bool:
    """Whether devices of several processes hold the same rows."""
    parts = devices_along(mesh, LAYER_PARTS)
    return any(
        len({device.process_index for device in same_rows}) > 1
        for same_rows in mesh.devices.reshape(-1, parts)
    )


NAMES = {
    "V": "padded vocabulary",
    "D": "hidden_size",
    "N": "num_attention_heads",
    "K": "num_key_value_heads",
    "F": "intermediate_size",
}


def parameter_shardings(
    config: ModelConfig, mesh: Mesh | AbstractMesh, adapters: AdapterConfig | None = None
) -> dict:
    """A `NamedSharding` for each parameter, in the shape of the parameter tree.

    Raises UserError where a dimension does not divide over its mesh axis.
    """
    size = sizes(config)
    for letter, name in NAMES.items():
        axis = RULES[letter]
        if axis and size[letter] % mesh.shape[axis]:
            raise UserError(
                f"mesh.{axis}={mesh.shape[axis]} does not divide the model's {name}"
                f" ({size[letter]}); choose a divisor of it"
            )

    pieces = devices_along(mesh, VOCABULARY)
    if size["V"] % pieces:
        raise UserError(
            f"mesh.{' x mesh.'.join(VOCABULARY)} = {pieces} does not divide the padded vocabulary"
            f" ({size['V']}); use powers of two"
        )

    def sharding(axes: str) -> NamedSharding:
        # A norm's weight is a few kilobytes: not worth a gather.
        return NamedSharding(
            mesh,
            (
                PartitionSpec()
                if axes in ("D", "LD")
                else PartitionSpec(*(RULES[letter] for letter in axes))
            ),
        )

    return jax.tree.map(sharding, parameter_axes(config, adapters))


class Layout:
    """Where arrays lie while the model runs. Here nothing moves; `MeshLayout` is the same over a
    mesh.
    """

    def weight(self, axes: str, weight: jax.Array) -> jax.Array:
        """A weight (its dimensions as letters) on its way into the arithmetic."""
        return weight

    def rows(self, x: jax.Array) -> jax.Array:
        """An activation [B, ...] between layers."""
        return x

    def look_up(self, table_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
        """The rows of a table, [B, T, D]."""
        return jnp.take(table_VD, tokens_BT, axis=0)


class MeshLayout(Layout):
    """Where the model's arrays lie while it runs on `mesh`: rows split over `ROW_AXES`, each
    layer's weights over those of their axes that do not split the width D.
    """

    def __init__(self, mesh: Mesh | AbstractMesh):
        self._mesh = mesh

    def weight(self, axes, weight):
        """Gathered over the width D in the dtype that it arrives in; its gradient goes straight
        back into shards.
        """
        if len(axes) == 1:
            return weight
        # As in ZeRO-3: D is split to store a layer, and whole while it computes.
        here = NamedSharding(self._mesh, PartitionSpec(*(RULES[letter] for letter in axes)))
        whole = NamedSharding(
            self._mesh,
            PartitionSpec(*(None if letter == "D" else RULES[letter] for letter in axes)),
        )
        return _moved(here, whole, weight)

    def rows(self, x):
        return jax.lax.with_sharding_constraint(x, NamedSharding(self._mesh, ROWS))

    def look_up(self, table_VD, tokens_BT):
        """Each device looks up its share of the width for the rows of its whole group; the table
        and its gradient stay where they are.
        """
        tokens_BT = jax.lax.with_sharding_constraint(
            tokens_BT, NamedSharding(self._mesh, PartitionSpec(REPEATS))
        )
        x_BTD = super().look_up(table_VD, tokens_BT)
        return jax.lax.with_sharding_constraint(
            x_BTD, NamedSharding(self._mesh, PartitionSpec(REPEATS, None, RULES["D"]))
        )


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _moved(here: NamedSharding, there: NamedSharding, x: jax.Array) -> jax.Array:
    """`x` from one sharding to another, and its gradient back: a plain constraint would hold the
    gradient `there`.
    """
    return jax.lax.with_sharding_constraint(jax.lax.with_sharding_constraint(x, here), there)


# The gradient is asked for `here`, in shards, so that a reduce-scatter can sum it.
_moved.defvjp(
    lambda here, there, x: (_moved(here, there, x), None),
    lambda here, there, _, grad: (jax.lax.with_sharding_constraint(grad, here),),
)


def abstract_params(
    config: ModelConfig,
    mesh: Mesh | AbstractMesh,
    dtype,
    adapters: AdapterConfig | None = None,
    quantization: Quantization = "none",
) -> dict:
    """The parameter tree as `ShapeDtypeStruct`s that know their sharding: what to restore, import
    or compile for.

    With a `quantization` the layers' matrices are `Quantized`.
    """
    size = sizes(config, adapters)
    params = jax.tree.map(
        lambda axes, sharding: jax.ShapeDtypeStruct(
            tuple(size[letter] for letter in axes), dtype, sharding=sharding
        ),
        parameter_axes(config, adapters),
        parameter_shardings(config, mesh, adapters),
    )
    if quantization != "none":
        matrices = {
            name: _abstract_quantized(params["layers"][name], quantization, len(INPUTS[name]))
            for name in LAYER_MATRICES
        }
        params["layers"] |= matrices
    return params


def _abstract_quantized(
    weight: jax.ShapeDtypeStruct, kind: Literal["int8", "nf4"], inputs: int
) -> Quantized:
    """A weight's codes and scales lie as it does; a dimension of the scales that does not divide
    over the mesh is whole everywhere.
    """
    mesh = weight.sharding.mesh
    kept = jax.eval_shape(partial(quantize, kind=kind, inputs=inputs), weight)

    def place(part: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        axes = [
            axis if axis and size % mesh.shape[axis] == 0 else None
            for size, axis in zip(part.shape, weight.sharding.spec, strict=True)
        ]
        return jax.ShapeDtypeStruct(
            part.shape, part.dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes))
        )

    placed = jax.tree.map(place, kept)
    if placed.q.sharding.spec != weight.sharding.spec:
        raise UserError(
            f"a mesh of {dict(mesh.shape)} does not divide weights of two to a byte; choose fewer"
            " devices, or lora.quantize=int8"
        )
    return placed
