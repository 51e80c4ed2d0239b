"""The mesh and the table: what goes where, and what cannot."""

import json
import re
import socket
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from places import FIXTURES, ROOT, environment
from reference import config_of, hf_llama

from llasa_jax.errors import UserError
from llasa_jax.model.settings import ModelSettings
from llasa_jax.model.sharding import (
    ROWS,
    abstract_params,
    make_mesh,
    parameter_shardings,
    rows_here,
    shares_rows,
)
from llasa_jax.train.optimizer import make_optimizer
from llasa_jax.train.settings import OptimizerSettings
from llasa_jax.train.step import TrainStep


def test_mesh_sizes():
    assert dict(make_mesh().shape) == {"data": 1, "fsdp": 8, "tensor": 1}
    assert dict(make_mesh(2, -1, 2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert dict(make_mesh(-1, 1, 1, devices=jax.devices()[:3]).shape) == {
        "data": 3,
        "fsdp": 1,
        "tensor": 1,
    }


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
    with pytest.raises(
        UserError, match=r"mesh.tensor=2 does not divide the model's num_key_value_heads \(1\)"
    ):
        parameter_shardings(config, make_mesh(1, -1, 2))


def test_slices_repeat_the_weights():
    with pytest.raises(UserError, match=r"mesh.data=1 is not a multiple of mesh.slices=2"):
        make_mesh(1, -1, 1, slices=2)
    with pytest.raises(UserError, match=r"mesh.slices=2 does not match the processes at hand"):
        make_mesh(2, -1, 1, slices=2)


@pytest.mark.parametrize("shape", [(1, 8, 1), (2, 2, 2)])
def test_the_compiled_steps_hold_neither_a_rows_logits_nor_a_whole_table(shape):
    """On their own buffers, forward and backward, and in validation. Sizes are such that nothing
    else is as large.
    """
    config = config_of(hf_llama(vocab=5000))
    rows, length, chunk, pieces = 8, 128, 16, shape[1] * shape[2]
    step = TrainStep(
        config,
        ModelSettings(dtype="float32", loss_chunk=chunk),
        make_optimizer(OptimizerSettings(), 9),
        make_mesh(*shape),
    )
    batch = {
        name: jax.ShapeDtypeStruct((1, rows, length), dtype, sharding=step.batch_sharding)
        for name, dtype in step.BATCH.items()
    }
    table = config.padded_vocab_size * config.hidden_size
    for compiled in (
        step.compile(1, rows, length),
        step.validate.lower(step.frozen, step.trainable, batch).compile(),
    ):
        sizes = [
            np.prod([int(n) for n in dims.split(",")])
            for dims in re.findall(r"f32\[([\d,]+)\]", compiled.as_text())
        ]
        assert (
            max(sizes) == rows // shape[0] * chunk * config.padded_vocab_size // pieces
        )  # a chunk's logits
        assert max(sizes) < min(table, length * config.padded_vocab_size)


ONE_OF_TWO = """
import sys
import jax
jax.distributed.initialize(f"localhost:{sys.argv[1]}", 2, int(sys.argv[2]))
import functools, json
import numpy as np
from reference import config_of, hf_llama, params_of
from twenty_steps import ACCUMULATION, OPTIMIZER, ROWS, STEPS, make_batches
from llasa_jax.train.optimizer import make_optimizer
from llasa_jax.model.settings import ModelSettings
from llasa_jax.model.sharding import make_mesh, parameter_shardings
from llasa_jax.train.step import TrainStep

config, mesh = config_of(hf_llama()), make_mesh(2, 2, 1, slices=2)
assert [[d.process_index for d in row.flat] for row in mesh.devices] == [[0, 0], [1, 1]]
settings = ModelSettings(dtype="float32", loss_chunk=16)
functions = TrainStep(config, settings, make_optimizer(OPTIMIZER, STEPS), mesh)
params = jax.device_put(params_of(hf_llama()), parameter_shardings(config, mesh))
opt_state, numbers = functions.init(params), []
mine = slice(jax.process_index() * ROWS // 2, (jax.process_index() + 1) * ROWS // 2)
for batch, _ in zip(make_batches(), range(3)):
    place = functools.partial(jax.make_array_from_process_local_data, functions.batch_sharding)
    batch = {name: place(np.ascontiguousarray(x[:, mine])) for name, x in batch.items()}
    assert batch["tokens"].shape[:2] == (ACCUMULATION, ROWS)
    params, opt_state, metrics = functions.train({}, params, opt_state, batch)
    numbers.append({name: float(value) for name, value in metrics.items()})
print(json.dumps(numbers))
"""


def test_two_processes_train_like_one():
    from twenty_steps import train

    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    alone = environment(2, PYTHONPATH=f"{FIXTURES}:{ROOT}")
    alone.pop("JAX_COMPILATION_CACHE_DIR", None)
    command = [sys.executable, "-c", ONE_OF_TWO, str(port)]
    both = [
        subprocess.Popen(
            [*command, str(i)],
            env=alone,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for i in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=300) for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [0, 0], outputs
    one, _ = train(hf_llama(), make_mesh(1, 1, 1, devices=jax.devices()[:1]), steps=3)
    for stdout, _ in outputs:
        for mine, its in zip(json.loads(stdout.splitlines()[-1]), one, strict=True):
            for name in its:
                np.testing.assert_allclose(mine[name], its[name], rtol=2e-5, err_msg=name)


def test_rows_of_this_host():
    """All of them here; of a sharding in which the host has two pieces, those."""
    mesh = make_mesh(2, 2, 2)
    sharding = NamedSharding(mesh, PartitionSpec(None, *ROWS))
    assert rows_here(sharding, (3, 8, 16)) == [*range(8)]
    pieces = [slice(None), slice(0, 2), slice(None)], [slice(None), slice(4, 6), slice(None)]
    part = SimpleNamespace(
        addressable_devices_indices_map=lambda shape: {0: pieces[0], 1: pieces[1]}
    )
    assert rows_here(part, (3, 8, 16)) == [0, 1, 4, 5]


@pytest.mark.parametrize(("tensor", "shared"), [(1, False), (2, False), (4, True)])
def test_whether_hosts_share_rows(tensor, shared):
    """Two hosts of two devices each."""
    devices = np.array([SimpleNamespace(process_index=i // 2) for i in range(4)])
    shape = {"data": 1, "fsdp": 4 // tensor, "tensor": tensor}
    mesh = SimpleNamespace(shape=shape, devices=devices.reshape(*shape.values()))
    assert shares_rows(mesh) == shared
