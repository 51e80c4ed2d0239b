"""Where every array lives: one mesh, and one table from the model's alphabet to the mesh's axes.

`data` repeats the weights and splits the rows; `fsdp` splits both; `tensor` splits heads, MLP and vocabulary.
"""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from llasa_jax.config import ModelConfig
from llasa_jax.errors import UserError
from llasa_jax.model import parameter_axes, sizes

MESH_AXES = ("data", "fsdp", "tensor")
RULES = {"L": None, "V": "tensor", "D": "fsdp", "N": "tensor", "K": "tensor", "H": None, "F": "tensor"}
ROWS = PartitionSpec(("data", "fsdp"))


def make_mesh(data: int = 1, fsdp: int = -1, tensor: int = 1, devices=None) -> Mesh:
    """A (data, fsdp, tensor) mesh over `devices` (all by default); at most one size may be -1, "all that remain"."""
    devices = jax.devices() if devices is None else devices
    shape = [data, fsdp, tensor]
    named = dict(zip(MESH_AXES, shape, strict=True))
    if shape.count(-1) > 1 or any(n == 0 or n < -1 for n in shape):
        raise UserError(f"mesh sizes must be positive, with at most one -1 for the rest, but are {named}")
    fixed = int(np.prod([n for n in shape if n != -1]))
    if len(devices) % fixed or (-1 not in shape and fixed != len(devices)):
        raise UserError(
            f"a mesh of {named} does not divide {len(devices)} devices; "
            f"make the product of its sizes {len(devices)}, or set one of them to -1"
        )
    shape = [len(devices) // fixed if n == -1 else n for n in shape]
    return jax.make_mesh(tuple(shape), MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


NAMES = {"V": "padded vocabulary", "D": "hidden_size", "N": "num_attention_heads", "K": "num_key_value_heads", "F": "intermediate_size"}


def parameter_shardings(config: ModelConfig, mesh: Mesh) -> dict:
    """A `NamedSharding` for each parameter, in the shape of the parameter tree.

    Raises UserError where a dimension does not divide over its mesh axis.
    """
    size = sizes(config)
    for letter, name in NAMES.items():
        axis = RULES[letter]
        if size[letter] % mesh.shape[axis]:
            raise UserError(f"mesh.{axis}={mesh.shape[axis]} does not divide the model's {name} ({size[letter]}); choose a divisor of it")

    def sharding(axes: str) -> NamedSharding:
        # A norm's weight is a few kilobytes: not worth a gather.
        return NamedSharding(mesh, PartitionSpec() if axes in ("D", "LD") else PartitionSpec(*(RULES[letter] for letter in axes)))

    return jax.tree.map(sharding, parameter_axes(config))


def abstract_params(config: ModelConfig, mesh: Mesh, dtype) -> dict:
    """The parameter tree as `ShapeDtypeStruct`s that know their sharding: what to restore, import or compile for."""
    size = sizes(config)
    return jax.tree.map(
        lambda axes, sharding: jax.ShapeDtypeStruct(tuple(size[letter] for letter in axes), dtype, sharding=sharding),
        parameter_axes(config),
        parameter_shardings(config, mesh),
    )
