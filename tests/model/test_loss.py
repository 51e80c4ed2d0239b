"""The chunked loss against torch's cross-entropy, and that it never builds a row's logits."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from llasa_jax.model.loss import chunked_cross_entropy, chunked_ranks

B, T, D, V, PADDED = 3, 64, 16, 1000, 1024


def inputs(seed=0):
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(B, T, D)).astype(np.float32)
    table = np.pad(rng.normal(size=(V, D)).astype(np.float32), ((0, PADDED - V), (0, 0)))
    return hidden, table, rng.integers(0, V, (B, T)).astype(np.int32), rng.random((B, T)) < 0.7


@pytest.mark.parametrize("chunk", [8, 64])
def test_equals_torch(chunk):
    hidden, table, targets, mask = inputs()

    def nats(hidden, table):
        return chunked_cross_entropy(hidden, table, targets, mask, vocab_size=V, chunk=chunk)

    (total, correct), (grad_hidden, grad_table) = jax.value_and_grad(
        nats, argnums=(0, 1), has_aux=True
    )(hidden, table)
    h, w = torch.from_numpy(hidden).requires_grad_(), torch.from_numpy(table[:V]).requires_grad_()
    logits = h @ w.T
    expected = torch.nn.functional.cross_entropy(
        logits[mask], torch.from_numpy(targets).long()[mask], reduction="sum"
    )
    expected.backward()
    # Sums of some 130 losses of 10 nats each in float32.
    np.testing.assert_allclose(total, expected.item(), rtol=1e-5)
    np.testing.assert_allclose(grad_hidden, h.grad, atol=1e-5)
    np.testing.assert_allclose(grad_table[:V], w.grad, atol=1e-5)
    np.testing.assert_array_equal(grad_table[V:], 0)
    assert (
        correct == (logits[mask].argmax(-1) == torch.from_numpy(targets).long()[mask]).sum().item()
    )


def test_accuracy_counts_hits():
    hidden, table, _, mask = inputs()
    best = np.argmax(hidden @ table[:V].T, axis=-1).astype(np.int32)
    _, correct = chunked_cross_entropy(hidden, table, best, mask, vocab_size=V, chunk=8)
    assert correct == mask.sum()


@pytest.mark.parametrize("chunk", [8, 64])
def test_ranks_equal_torch(chunk):
    hidden, table, targets, _ = inputs()
    nll, rank = chunked_ranks(hidden, table, targets, vocab_size=V, chunk=chunk)
    logits = torch.from_numpy(hidden) @ torch.from_numpy(table[:V]).T
    wanted = torch.from_numpy(targets).long()
    expected = torch.nn.functional.cross_entropy(
        logits.reshape(-1, V), wanted.reshape(-1), reduction="none"
    ).reshape(B, T)
    np.testing.assert_allclose(nll, expected, rtol=1e-5)
    best = logits.topk(10, dim=-1).indices
    np.testing.assert_array_equal(rank == 0, best[..., 0] == wanted)
    np.testing.assert_array_equal(rank < 10, (best == wanted[..., None]).any(-1))
    assert np.any(rank < 10)


def test_no_buffer_holds_a_rows_logits():
    hidden, table, targets, mask = inputs()

    def nats(hidden, table, chunk):
        return chunked_cross_entropy(hidden, table, targets, mask, vocab_size=V, chunk=chunk)[0]

    def largest(chunk):
        compiled = (
            jax.jit(jax.grad(nats, argnums=(0, 1)), static_argnums=2)
            .lower(hidden, table, chunk)
            .compile()
            .as_text()
        )
        shapes = (
            tuple(map(int, dims.split(","))) for dims in re.findall(r"f32\[([\d,]+)\]", compiled)
        )
        return max(np.prod(shape) for shape in shapes if shape[-1] == PADDED and len(shape) > 1)

    assert largest(T) >= B * T * PADDED
    assert largest(8) <= B * 8 * PADDED
    ranks = (
        jax.jit(partial(chunked_ranks, vocab_size=V, chunk=8))
        .lower(hidden, table, targets)
        .compile()
        .as_text()
    )
    assert f"f32[{B},8,{PADDED}]" in ranks
    assert f"[{B},{T},{PADDED}]" not in ranks


def test_empty_mask_is_zero_not_nan():
    hidden, table, targets, mask = inputs()
    total, correct = chunked_cross_entropy(
        jnp.asarray(hidden), table, targets, np.zeros_like(mask), vocab_size=V, chunk=8
    )
    assert total == correct == 0


@pytest.mark.parametrize("broken", [0.0, np.nan])
def test_ties_are_not_hits(broken):
    """A damaged model whose scores are all equal, or no numbers, knows nothing: its accuracy is 0,
    and no target is among the ten most probable.
    """
    hidden, table, targets, _ = inputs()
    hidden, mask = np.full_like(hidden, broken), np.ones_like(targets, bool)
    sizes = {"vocab_size": V, "chunk": 8}
    total, correct = chunked_cross_entropy(hidden, table, targets, mask, **sizes)
    assert correct == 0
    nll, others = chunked_ranks(hidden, table, targets, **sizes)
    np.testing.assert_array_equal(others, V - 1)
    if broken == 0:
        np.testing.assert_allclose(nll, np.log(V), rtol=1e-5)
        np.testing.assert_allclose(total, B * T * np.log(V), rtol=1e-5)


def test_a_tie_of_two_is_no_hit():
    hidden, table, _, mask = inputs()
    table[1] = table[0]
    hidden[:] = table[0]  # both score highest, by far
    zeros = np.zeros((B, T), np.int32)
    _, correct = chunked_cross_entropy(hidden, table, zeros, mask, vocab_size=V, chunk=8)
    assert correct == 0
    _, others = chunked_ranks(hidden, table, zeros, vocab_size=V, chunk=8)
    np.testing.assert_array_equal(others, 1)
