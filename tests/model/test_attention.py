"""Every attention against a plain softmax in float64, and that none lets a clip see its neighbour.
Kernels run interpreted, on the CPU.
"""

import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llasa_jax.model import attention
from llasa_jax.model.attention import choose_attention, xla_attention
from llasa_jax.model.sharding import make_mesh

B, T, N, K, H = 2, 256, 4, 2, 64
LENGTHS = (70, 1, 100, 60, 25)  # the last is padding


def inputs(seed=0, length=T):
    rng = np.random.default_rng(seed)
    q, k, v = (rng.normal(size=(B, length, heads, H)).astype(np.float32) for heads in (N, K, K))
    segment_ids = np.tile(np.repeat([1, 2, 3, 4, 0], LENGTHS), -(-length // T))[:length]
    return q, k, v, np.broadcast_to(segment_ids, (B, length)).astype(np.int32)


def by_hand(q, k, v, segment_ids):
    k, v = (np.repeat(x.astype(np.float64), N // K, axis=2) for x in (k, v))
    scores = np.einsum("bqnh,bknh->bnqk", q.astype(np.float64), k) / H**0.5
    seen = (segment_ids[:, :, None] == segment_ids[:, None, :]) & np.tri(q.shape[1], dtype=bool)
    scores = np.where(seen[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bnqk,bknh->bqnh", weights / weights.sum(-1, keepdims=True), v)


def function(name):
    return choose_attention(name, make_mesh(1, 2, 2, devices=jax.devices()[:4]), interpret=True)


@pytest.mark.parametrize("name", ["xla", "splash", "triton"])
def test_result_and_gradients_equal_plain_attention(name, monkeypatch):
    attend = function(name)
    monkeypatch.setattr(attention, "QUERY_BLOCK", 64)
    q, k, v, segment_ids = inputs()
    cotangent = np.random.default_rng(1).normal(size=q.shape).astype(np.float32)
    out, grads = jax.jit(
        lambda *qkv: (lambda o, f: (o, f(cotangent)))(
            *jax.vjp(lambda *x: attend(*x, segment_ids), *qkv)
        )
    )(q, k, v)
    # Float32 sums over at most 100 keys.
    np.testing.assert_allclose(out, by_hand(q, k, v, segment_ids), atol=2e-5)
    monkeypatch.setattr(attention, "QUERY_BLOCK", T)
    expected = jax.jit(
        lambda *qkv: jax.vjp(lambda *x: xla_attention(*x, segment_ids), *qkv)[1](cotangent)
    )(q, k, v)
    for mine, its in zip(grads, expected, strict=True):
        np.testing.assert_allclose(mine, its, atol=5e-5)


@pytest.mark.parametrize("name", ["xla", "splash", "triton"])
def test_no_clip_sees_its_neighbour(name):
    q, k, v, segment_ids = inputs()
    attend = jax.jit(function(name))
    before = np.asarray(attend(q, k, v, segment_ids))
    changed = segment_ids[0] == 3
    other_k, other_v = k.copy(), v.copy()
    other_k[:, changed] = 3.0
    other_v[:, changed] = 5.0
    after = np.asarray(attend(q, other_k, other_v, segment_ids))
    np.testing.assert_array_equal(after[:, ~changed], before[:, ~changed])
    assert np.abs(after[:, changed] - before[:, changed]).max() > 1


@pytest.mark.parametrize("name", ["splash", "triton"])
def test_what_a_kernel_cannot_take_falls_back_with_a_warning(name):
    attend = choose_attention(name, make_mesh(1, 1, 1, devices=jax.devices()[:1]), interpret=True)
    q, k, v, segment_ids = inputs(length=200)
    with pytest.warns(UserWarning, match=f"{name} attention cannot take rows of 200 tokens"):
        out = attend(q, k, v, segment_ids)
    np.testing.assert_allclose(out, by_hand(q, k, v, segment_ids), atol=2e-5)


def test_auto_follows_the_platform():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose_attention("auto", make_mesh()) is xla_attention
    assert attention.OF_PLATFORM == {"tpu": "splash", "gpu": "triton"}


@pytest.mark.parametrize("heads", [64, 128])
def test_the_gpu_kernel_lowers_for_cuda_without_a_gpu(heads):
    shape = jax.ShapeDtypeStruct((1, 256, 2, heads), jnp.bfloat16)

    def total(q, k, v, segment_ids):
        return attention.triton_attention(q, k, v, segment_ids).sum()

    traced = jax.jit(jax.grad(total, argnums=(0, 1, 2))).trace(
        shape, shape, shape, jax.ShapeDtypeStruct((1, 256), jnp.int32)
    )
    assert traced.lower(lowering_platforms=("cuda",)).as_text().count("mha_backward") >= 1


def test_no_buffer_holds_whole_scores():
    length = 4 * attention.QUERY_BLOCK
    q, k, v, segment_ids = inputs(length=length)
    compiled = (
        jax.jit(jax.grad(lambda q: xla_attention(q, k, v, segment_ids).sum()))
        .lower(q)
        .compile()
        .as_text()
    )
    sizes = [
        np.prod([int(n) for n in dims.split(",")])
        for dims in re.findall(r"f32\[([\d,]+)\]", compiled)
    ]
    assert max(sizes) == B * N * attention.QUERY_BLOCK * length
