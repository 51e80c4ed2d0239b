"""The model against transformers' `LlamaForCausalLM`, in float32.

Tolerance 1e-4 on logits of order 1 to 10: sums over at most 48 channels in another order differ by
some 1e-6, layer on layer.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from reference import config_of, grads_of, hf_llama, our_llama, params_of

from llasa_jax.model.config import RopeScaling
from llasa_jax.model.llama import Cache, Llama, rope_frequencies
from llasa_jax.model.loss import chunked_cross_entropy

EVERY_SHAPE = [
    (tied, kv_heads, scaled)
    for tied in (True, False)
    for kv_heads in (1, 2, 4)
    for scaled in (True, False)
]


def tokens_and_positions(vocab=300, rows=2, length=96, seed=0):
    tokens = np.random.default_rng(seed).integers(0, vocab, (rows, length)).astype(np.int32)
    return tokens, np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)


@pytest.mark.parametrize(("tied", "kv_heads", "scaled"), EVERY_SHAPE)
def test_logits_equal_hf(tied, kv_heads, scaled):
    hf = hf_llama(tied=tied, kv_heads=kv_heads, scaled=scaled)
    tokens, positions = tokens_and_positions()
    with torch.no_grad():
        expected = hf(torch.from_numpy(tokens).long()).logits.numpy()
    model = our_llama(config_of(hf), params_of(hf))
    logits = model.logits(model(tokens, positions, np.ones_like(tokens)))
    assert logits.shape == (2, 96, 300)
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)
    assert np.abs(expected).max() > 1


@pytest.mark.parametrize(
    ("tied", "kv_heads", "scaled"), [(True, 2, True), (False, 1, True), (False, 4, False)]
)
@pytest.mark.parametrize("remat", ["none", "full"])
def test_gradients_equal_hf(tied, kv_heads, scaled, remat):
    hf = hf_llama(tied=tied, kv_heads=kv_heads, scaled=scaled)
    tokens, positions = tokens_and_positions()
    labels = torch.from_numpy(tokens).long().clone()
    labels[:, :20] = -100
    hf_loss = hf(torch.from_numpy(tokens).long(), labels=labels).loss
    hf_loss.backward()
    config = config_of(hf)
    targets = np.roll(tokens, -1, axis=1)
    mask = np.zeros(tokens.shape, bool)
    mask[:, 19:-1] = True

    def mean_loss(params):
        model = our_llama(config, params, remat=remat)
        hidden = model(tokens, positions, np.ones_like(tokens))
        nats, _ = chunked_cross_entropy(
            *model.output_factors(hidden), targets, mask, vocab_size=300, chunk=32
        )
        return nats / mask.sum()

    loss, grads = jax.value_and_grad(mean_loss)(params_of(hf))
    np.testing.assert_allclose(loss, hf_loss.item(), atol=1e-5)
    for (path, ours), theirs in zip(
        jax.tree.leaves_with_path(grads), jax.tree.leaves(grads_of(hf)), strict=True
    ):
        np.testing.assert_allclose(
            ours, theirs, atol=1e-4 * max(1, np.abs(theirs).max()), rtol=0, err_msg=str(path)
        )


def test_packed_clips_are_as_if_alone():
    hf = hf_llama()
    model = our_llama(config_of(hf), params_of(hf))
    lengths = (17, 40, 23)
    tokens, _ = tokens_and_positions(rows=1, length=sum(lengths) + 16)
    segment_ids = np.concatenate(
        [np.full(n, i + 1) for i, n in enumerate(lengths)] + [np.zeros(16)]
    )[None].astype(np.int32)
    positions = np.concatenate([np.arange(n) for n in (*lengths, 16)])[None].astype(np.int32)
    packed = model.logits(model(tokens, positions, segment_ids))[0]
    at = 0
    for n in lengths:
        with torch.no_grad():
            alone = hf(torch.from_numpy(tokens[:, at : at + n]).long()).logits[0].numpy()
        np.testing.assert_allclose(packed[at : at + n], alone, atol=1e-4)
        at += n


def test_no_clip_and_no_earlier_token_sees_another():
    """By gradient: what an output depends on is exactly what it may see, whatever the weights."""
    hf = hf_llama()
    config, params = config_of(hf), params_of(hf)
    segment_ids = np.array([[1, 1, 1, 2, 2, 2, 0, 0]], np.int32)
    positions = np.array([[0, 1, 2, 0, 1, 2, 0, 1]], np.int32)
    tokens = np.arange(8, dtype=np.int32)[None]

    def output(embed, at):
        return our_llama(config, params | {"embed": embed})(tokens, positions, segment_ids)[
            0, at
        ].sum()

    for at in range(6):
        seen = np.abs(jax.grad(output)(params["embed"], at)).sum(-1)[:8] > 0
        np.testing.assert_array_equal(
            seen, (segment_ids[0] == segment_ids[0, at]) & (np.arange(8) <= at)
        )


def test_cached_decoding_equals_the_whole_row():
    hf = hf_llama(kv_heads=1)
    config = config_of(hf)
    model = our_llama(config, params_of(hf))
    tokens, positions = tokens_and_positions(length=12)
    whole = model(tokens, positions, np.ones_like(tokens))
    cache = Cache.empty(config, rows=2, length=16, dtype=jnp.float32)
    pieces = []
    for start, stop in ((0, 5), (5, 6), (6, 7), (7, 12)):
        hidden, cache = model.decode(tokens[:, start:stop], positions[:, start:stop], cache)
        pieces.append(hidden)
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), whole, atol=1e-5)


def test_bfloat16_computes_in_bfloat16_over_float32_weights():
    hf = hf_llama()
    config = config_of(hf)
    model = our_llama(config, params_of(hf), dtype=jnp.bfloat16)
    tokens, positions = tokens_and_positions()
    hidden = model(tokens, positions, np.ones_like(tokens))
    assert hidden.dtype == jnp.bfloat16
    assert model.logits(hidden).dtype == jnp.float32
    with torch.no_grad():
        expected = hf(torch.from_numpy(tokens).long()).logits.numpy()
    # bfloat16 keeps 8 bits: 0.4% an operation, over two layers of six matrix products a few per
    # cent of the largest logit.
    assert np.abs(model.logits(hidden) - expected).max() < 0.05 * np.abs(expected).max()


def test_compiled_size_does_not_grow_with_depth():
    def size(layers):
        hf = hf_llama(layers=layers)
        config, params = config_of(hf), params_of(hf)
        tokens, positions = tokens_and_positions()
        lowered = jax.jit(
            lambda p: our_llama(config, p)(tokens, positions, np.ones_like(tokens))
        ).lower(params)
        return lowered.as_text().count("\n")

    assert size(12) == size(2)


def test_rope_scaling_is_llama_3s():
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    hf = hf_llama(head_dim=64, hidden_size=256)
    hf.config.rope_parameters |= {"rope_theta": 500_000.0, "original_max_position_embeddings": 8192}
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](hf.config, "cpu")
    np.testing.assert_allclose(
        rope_frequencies(64, 500_000.0, RopeScaling(32.0, 1.0, 4.0, 8192)),
        expected.numpy(),
        rtol=2e-6,
    )


def test_fresh_weights_have_llamas_spread():
    model = Llama(config_of(hf_llama(vocab=5000)), rngs=nnx.Rngs(0))
    assert abs(float(model.embed[...].std()) - 0.02) < 0.001
    q = np.asarray(model.layers.q[...])
    assert not np.array_equal(q[0], q[1])
