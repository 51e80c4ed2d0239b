"""Quantised weights against PyTorch's int8, the published 4-bit NormalFloat and qwix's. Shapes are layers, outputs, inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
import torch

from llasa_jax.quantize import NF4, Quantized, quantize


def weights(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32) * 0.02


def test_int8_is_pytorchs():
    weight = weights(3, 16, 4, 24)
    kept = quantize(jnp.asarray(weight), "int8", inputs=2)
    assert kept.scales.shape == (3, 16, 1, 1)
    for layer, codes, scales in zip(weight, kept.codes, kept.scales, strict=True):
        scale, zero = torch.tensor(scales.ravel()), torch.zeros(16, dtype=torch.int32)
        theirs = torch.fake_quantize_per_channel_affine(torch.tensor(layer), scale, zero, 0, -127, 127)
        np.testing.assert_allclose(Quantized(codes, scales, 2).dense(jnp.float32), theirs, rtol=1e-6)
    # Half a step, and float32's own rounding of it
    assert (np.abs(kept.dense(jnp.float32) - weight) <= kept.scales * 0.5001).all()


def test_nf4_values_are_the_quantiles_of_a_normal_distribution():
    # bitsandbytes' `create_normal_map`: 8 quantiles above zero, 7 below, between the same outermost two; the table is in float32.
    outermost = 0.9677083
    normal = torch.distributions.Normal(0, 1)
    above = normal.icdf(torch.linspace(outermost, 0.5, 9)[:-1])
    below = -normal.icdf(torch.linspace(outermost, 0.5, 8)[:-1])
    values = torch.cat([above, torch.zeros(1), below]).sort().values
    np.testing.assert_allclose(NF4, values / values.max(), atol=1e-6)


@pytest.mark.parametrize(("shape", "inputs"), [((2, 128, 24), 1), ((2, 3, 64, 24), 1), ((2, 192, 3, 8), 2)])
def test_nf4_is_qwixs(shape, inputs):
    weight = jnp.asarray(weights(*shape))
    tiled = len(shape) - inputs - 1
    kept = quantize(weight, "nf4", inputs)
    alone = {axis for axis in range(len(shape)) if axis != tiled}
    theirs = qwix.quantize(weight, "nf4", channelwise_axes=alone, tiled_axes={tiled: 64}, scale_dtype=jnp.bfloat16)
    assert kept.codes.nbytes * 2 == weight.size
    np.testing.assert_array_equal(kept.scales, theirs.scale)
    # Two bfloat16 roundings where ours has one
    np.testing.assert_allclose(kept.dense(jnp.float32), qwix.dequantize(theirs).astype(jnp.float32), rtol=2**-7)
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
    assert np.abs(quantize(jnp.asarray(weight), kind, inputs=1).dense(jnp.float32) - weight).max() < 0.16 * np.abs(weight).max()
