"""Quantised weights against PyTorch's int8, the published 4-bit NormalFloat and qwix's. Shapes are
layers, outputs, inputs.
"""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
import torch
from flax import nnx
from jax.sharding import AbstractMesh, AxisType
from lora_step import one_device, start_of, step_for
from reference import config_of, hf_llama, our_llama, params_of
from tiny_run import losses, make_clips, make_model, settings_for
from twenty_steps import make_batches

from llasa_jax.convert import model_folder
from llasa_jax.convert.export_hf import export_hf
from llasa_jax.errors import UserError
from llasa_jax.generate.decode import generate_codes
from llasa_jax.generate.speaker import load
from llasa_jax.model.axes import INPUTS
from llasa_jax.model.llama import Cache
from llasa_jax.model.quantize import NF4, Quantized, quantize
from llasa_jax.model.settings import LoraSettings
from llasa_jax.model.sharding import LAYER_MATRICES, MESH_AXES, abstract_params, make_mesh
from llasa_jax.train.loop import train


def weights(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32) * 0.02


def test_int8_is_pytorchs():
    weight = weights(3, 16, 4, 24)
    kept = quantize(jnp.asarray(weight), "int8", inputs=2)
    assert kept.scales.shape == (3, 16, 1, 1)
    for layer, codes, scales in zip(weight, kept.q, kept.scales, strict=True):
        scale, zero = torch.tensor(scales.ravel()), torch.zeros(16, dtype=torch.int32)
        theirs = torch.fake_quantize_per_channel_affine(
            torch.tensor(layer), scale, zero, 0, -127, 127
        )
        np.testing.assert_allclose(
            Quantized(codes, scales, 2).dense(jnp.float32), theirs, rtol=1e-6
        )
    # Half a step, and float32's own rounding of it
    assert (np.abs(kept.dense(jnp.float32) - weight) <= kept.scales * 0.5001).all()


def test_nf4_values_are_the_quantiles_of_a_normal_distribution():
    # bitsandbytes' `create_normal_map`: 8 quantiles above zero, 7 below, between the same outermost
    # two; the table is in float32.
    outermost = 0.9677083
    normal = torch.distributions.Normal(0, 1)
    above = normal.icdf(torch.linspace(outermost, 0.5, 9)[:-1])
    below = -normal.icdf(torch.linspace(outermost, 0.5, 8)[:-1])
    values = torch.cat([above, torch.zeros(1), below]).sort().values
    np.testing.assert_allclose(NF4, values / values.max(), atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "inputs"), [((2, 128, 24), 1), ((2, 3, 64, 24), 1), ((2, 192, 3, 8), 2)]
)
def test_nf4_is_qwixs(shape, inputs):
    weight = jnp.asarray(weights(*shape))
    tiled = len(shape) - inputs - 1
    kept = quantize(weight, "nf4", inputs)
    alone = {axis for axis in range(len(shape)) if axis != tiled}
    theirs = qwix.quantize(
        weight, "nf4", channelwise_axes=alone, tiled_axes={tiled: 64}, scale_dtype=jnp.bfloat16
    )
    assert kept.q.nbytes * 2 == weight.size
    np.testing.assert_array_equal(kept.scales, theirs.scale)
    # Two bfloat16 roundings where ours has one
    np.testing.assert_allclose(
        kept.dense(jnp.float32), qwix.dequantize(theirs).astype(jnp.float32), rtol=2**-7
    )
    # Nowhere further than half of the widest gap, 0.304, and of the scale's own rounding
    scales = np.repeat(kept.scales.astype(np.float32), 64, axis=tiled)
    assert (np.abs(kept.dense(jnp.float32) - weight) <= scales * (0.152 + 2**-8)).all()


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_layer_of_a_stack_is_that_layer(kind):
    stack = jnp.asarray(weights(3, 64, 16))
    kept = quantize(stack, kind, inputs=1)
    _, layers = jax.lax.scan(lambda _, layer: (None, layer.dense(jnp.float32)), None, kept)
    np.testing.assert_array_equal(layers, kept.dense(jnp.float32))
    np.testing.assert_array_equal(layers[1], quantize(stack[1], kind, inputs=1).dense(jnp.float32))


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_zeros_stay_zero_and_narrow_weights_have_narrow_tiles(kind):
    kept = quantize(jnp.zeros((8, 5)), kind, inputs=1)
    np.testing.assert_array_equal(kept.dense(jnp.float32), np.zeros((8, 5)))
    weight = weights(24, 5)
    assert (
        np.abs(quantize(jnp.asarray(weight), kind, inputs=1).dense(jnp.float32) - weight).max()
        < 0.16 * np.abs(weight).max()
    )


def quantised(params, kind):
    """The tree with the layers' matrices in few bits, and the one with what they stand for."""
    kept = {
        name: quantize(jnp.asarray(params["layers"][name]), kind, len(INPUTS[name]))
        for name in LAYER_MATRICES
    }
    dense = {name: np.asarray(weight.dense(jnp.float32)) for name, weight in kept.items()}
    return params | {"layers": params["layers"] | kept}, params | {
        "layers": params["layers"] | dense
    }


@pytest.mark.parametrize(
    ("kind", "mesh_shape"),
    [("int8", (1, 1, 1)), ("nf4", (1, 1, 1)), ("nf4", (2, 2, 2)), ("int8", (1, 4, 2))],
)
def test_a_step_is_loras_over_what_the_codes_stand_for(kind, mesh_shape):
    settings = LoraSettings(rank=4, alpha=8.0, dropout=0.0, targets=["q", "o", "down"])
    hf = hf_llama(tied=False)
    ours, theirs = quantised(params_of(hf), kind)
    step = step_for(
        hf,
        settings,
        make_mesh(*mesh_shape, devices=jax.devices()[: np.prod(mesh_shape)]),
        quantization=kind,
    )
    plain = step_for(hf, settings, one_device())
    batch = next(make_batches())
    results = []
    for functions, base in ((step, ours), (plain, theirs)):
        frozen, trainable = start_of(functions, base)
        places = jax.tree.map(lambda leaf: leaf.sharding, (functions.frozen, functions.trainable))
        frozen, trainable = jax.device_put((frozen, trainable), places)
        held_out = functions.validate(
            frozen, trainable, jax.device_put(batch, functions.batch_sharding)
        )
        results.append(
            (
                held_out,
                functions.train(
                    frozen,
                    trainable,
                    functions.init(trainable),
                    jax.device_put(batch, functions.batch_sharding),
                ),
            )
        )
    # Float32 sums in another order; the first AdamW step is the sign of each gradient, so adapters
    # are not compared where that is nothing.
    (held_out, (_, _, numbers)), (expected_held_out, (_, _, expected)) = results
    np.testing.assert_allclose(held_out["nats"], expected_held_out["nats"], rtol=1e-5)
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(numbers[name], expected[name], rtol=1e-4)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_weights_are_quantised_as_they_are_read(kind, tmp_path):
    hf = hf_llama(tied=False)
    params = params_of(hf)
    model_folder.write_description(tmp_path, config_of(hf), {"base_model": "tiny"})
    model_folder.save_params(tmp_path, params)
    expected, _ = quantised(jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params), kind)
    target = abstract_params(config_of(hf), make_mesh(2, 2, 2), jnp.bfloat16, quantization=kind)
    read = model_folder.restore_params(tmp_path, target)
    jax.tree.map(np.testing.assert_array_equal, read, expected)
    assert jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), read) == jax.tree.map(
        lambda x: (x.shape, x.dtype, x.sharding), target
    )


def test_a_quantised_model_speaks_as_what_its_codes_stand_for():
    hf = hf_llama(tied=False)
    graphdef = nnx.graphdef(our_llama(config_of(hf), params_of(hf)))
    tokens = jnp.arange(12).reshape(2, 6)
    hidden = []
    for params in quantised(params_of(hf), "nf4"):
        model = nnx.merge(graphdef, params)
        cache = Cache.empty(model.config, 2, 8, jnp.float32)
        hidden.append(
            jax.jit(model.decode)(tokens, jnp.broadcast_to(jnp.arange(6), tokens.shape), cache)[0]
        )
    np.testing.assert_allclose(*hidden, atol=1e-5)


def test_a_mesh_that_splits_bytes_is_refused():
    config = config_of(hf_llama())  # 32 wide: 16 bytes
    mesh = AbstractMesh((1, 32, 1), MESH_AXES, axis_types=(AxisType.Auto,) * 3)
    with pytest.raises(UserError, match="does not divide weights of two to a byte"):
        abstract_params(config, mesh, jnp.bfloat16, quantization="nf4")


@pytest.mark.filterwarnings("ignore:the loss is")
def test_a_qlora_run_goes_on_speaks_and_is_not_merged(tmp_path):
    model = make_model(tmp_path / "model")
    clips = make_clips()
    settings = settings_for(
        model,
        tmp_path / "run",
        lora={"rank": 4, "quantize": "nf4"},
        train={"steps": 3, "save_every": 1, "keep": 9},
    )
    train(settings, [clips], [clips[:3]])
    expected = losses(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "3")
    train(settings, [clips], [clips[:3]])
    assert losses(tmp_path / "run") == expected
    graphdef, params, prompter, _ = load(tmp_path / "run", "float32")
    assert isinstance(params["layers"]["q"], Quantized)
    (spoken,) = generate_codes(graphdef, params, [prompter.opening("word")], prompter.vocab, 3)
    assert len(spoken.tokens)
    export_hf(tmp_path / "run", tmp_path / "adapter", lora="adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    with pytest.raises(UserError, match=r"quantised to nf4.*--lora adapter"):
        export_hf(tmp_path / "run", tmp_path / "merged", lora="merge")
    assert not (tmp_path / "merged").exists()
