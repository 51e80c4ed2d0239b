"""The mesh and the table: what goes where, and what cannot."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec
from reference import config_of, hf_llama

from llasa_jax.errors import UserError
from llasa_jax.sharding import abstract_params, make_mesh, parameter_shardings


def test_mesh_sizes():
    assert dict(make_mesh().shape) == {"data": 1, "fsdp": 8, "tensor": 1}
    assert dict(make_mesh(2, -1, 2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert dict(make_mesh(-1, 1, 1, devices=jax.devices()[:3]).shape) == {"data": 3, "fsdp": 1, "tensor": 1}


@pytest.mark.parametrize("shape", [(3, -1, 1), (2, 2, 1), (-1, -1, 1), (0, -1, 1), (1, 16, 1)])
def test_impossible_meshes(shape):
    with pytest.raises(UserError, match="mesh"):
        make_mesh(*shape)


def test_parameters_are_split_as_the_table_says():
    config = config_of(hf_llama(tied=False))
    shardings = parameter_shardings(config, make_mesh(2, 2, 2))
    assert shardings["layers"]["q"].spec == PartitionSpec(None, "tensor", None, "fsdp")
    assert shardings["head"].spec == PartitionSpec("tensor", "fsdp")
    assert shardings["layers"]["attn_norm"].spec == PartitionSpec()
    shapes = abstract_params(config, make_mesh(), jnp.bfloat16)
    assert shapes["embed"].shape == (512, 32)
    assert shapes["layers"]["down"].shape == (2, 32, 48)


def test_what_does_not_divide_is_named():
    config = config_of(hf_llama(kv_heads=1))
    with pytest.raises(UserError, match=r"mesh.tensor=2 does not divide the model's num_key_value_heads \(1\)"):
        parameter_shardings(config, make_mesh(1, -1, 2))
