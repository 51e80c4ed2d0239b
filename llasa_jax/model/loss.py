"""Cross-entropy over the whole vocabulary without ever holding the logits of a whole row.

One row of 2,048 tokens over 193,800 classes is 1.6 GB of float32 logits. Here a loop takes `chunk`
tokens of every row at a time, of those that count alone, and the same pass makes that chunk's
gradients, so that nothing is computed twice. On a mesh each device holds its share of the
vocabulary and sees the rows of its whole group (see `sharding.GROUP`): neither the table nor its
gradient is ever gathered.

Letters: B rows, C tokens of a chunk, V vocabulary, D model width.
"""

from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from llasa_jax.model.sharding import GROUP, REPEATS, ROWS, TABLE, VOCABULARY, make_mesh

Factors = tuple[jax.Array, ...]
Rows = dict[str, jax.Array]  # arrays of a batch by name, [..., rows, length]
# The axes that split the vocabulary among devices with the same rows.
PARTS = tuple(axis for axis in VOCABULARY if axis not in GROUP)


class Loss(Protocol):
    """What a `TrainStep` minimises. `arrays` are those that its batches have besides, with their
    types: one number for each target. Its log-probabilities are those of scores that are divided
    by `temperature`.
    """

    arrays: dict[str, Any]
    temperature: float

    def totals(self, batch: Rows) -> Any:
        """What sums over a whole batch are divided by."""

    def shares(
        self, rows: Rows, totals: Any, features: Factors, tables: Factors, **sizes
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Of the rows of a micro-batch: their share of the loss, and of numbers to be logged. Over
        all micro-batches they add up. `features`, `tables` and `sizes` are the arguments of
        `chunked_cross_entropy`.
        """


class SupervisedLoss:
    """The mean of -log p over all targets of the batch, whatever row they are in."""

    arrays: dict[str, Any] = {}
    temperature = 1.0

    def totals(self, batch: Rows) -> jax.Array:
        return jnp.maximum(batch["loss_mask"].sum(dtype=jnp.float32), 1.0)

    def shares(self, rows: Rows, totals, features, tables, **sizes):
        nats, correct = chunked_cross_entropy(
            features, tables, rows["targets"], rows["loss_mask"], **sizes
        )
        return nats / totals, {"accuracy": correct / totals}


def chunked_cross_entropy(
    hidden_BTD: jax.Array | Factors,
    table_VD: jax.Array | Factors,
    targets_BT: jax.Array,
    mask_BT: jax.Array,
    *,
    vocab_size: int,
    chunk: int,
    mesh: Mesh | AbstractMesh | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The sum of -log p(target) in nats, and how many targets are likelier than every other token
    (a tie is not), over the tokens in `mask`.

    `table` may be padded beyond `vocab_size`: its padding takes no part. Both results are float32
    scalars; divide by the mask's sum for means. `chunk` must divide T. `mesh` is the first device
    alone if not given.

    `hidden` and `table` may be tuples: their products are summed, each with a D of its own. A table
    that is not differentiated costs no gradient.
    """
    mesh = mesh or make_mesh(1, 1, 1, devices=jax.devices()[:1])
    return _cross_entropy(
        vocab_size, chunk, mesh, _tuple(hidden_BTD), _tuple(table_VD), targets_BT, mask_BT
    )


def at_temperature(features: Factors, temperature: float) -> Factors:
    """Features, [..., F] each in its own type, whose scores are those of `features`, divided by
    `temperature`, which is above 0.
    """
    if temperature == 1:
        return features
    return tuple((x.astype(jnp.float32) / temperature).astype(x.dtype) for x in features)


def _tuple(x) -> Factors:
    return x if isinstance(x, tuple) else (x,)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _cross_entropy(vocab_size, chunk, mesh, hidden, table, targets, mask):
    return _on_mesh(vocab_size, chunk, mesh, None, hidden, table, targets, mask)[:2]


def chunked_log_probs(
    hidden_BTD: jax.Array | Factors,
    table_VD: jax.Array | Factors,
    targets_BT: jax.Array,
    mask_BT: jax.Array,
    *,
    vocab_size: int,
    chunk: int,
    mesh: Mesh | AbstractMesh | None = None,
) -> jax.Array:
    """log p(target) in nats, float32 [B, T], 0 where `mask` is False; the arguments are those of
    `chunked_cross_entropy`.

    For losses that are no sum over tokens. What a token weighs is known only once all are, so the
    backward pass makes the scores of each chunk a second time.
    """
    mesh = mesh or make_mesh(1, 1, 1, devices=jax.devices()[:1])
    return _log_probs(
        vocab_size, chunk, mesh, _tuple(hidden_BTD), _tuple(table_VD), targets_BT, mask_BT
    )


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _log_probs(vocab_size, chunk, mesh, hidden, table, targets, mask):
    sizes = {"vocab_size": vocab_size, "chunk": chunk, "mesh": mesh}
    return jnp.where(mask, -chunked_ranks(hidden, table, targets, **sizes)[0], 0.0)


def _log_probs_forward(vocab_size, chunk, mesh, hidden, table, targets, mask):
    # A number stands for a table that learns: what is kept must be arrays.
    learns = tuple(0 if one.perturbed else None for one in table)
    kept = jax.tree.map(lambda primal: primal.value, (hidden, table, targets, mask))
    return _log_probs(vocab_size, chunk, mesh, *kept), (*kept, learns)


def _log_probs_backward(vocab_size, chunk, mesh, kept, cotangent):
    hidden, table, targets, mask, marks = kept
    learns = tuple(mark is not None for mark in marks)
    # The gradient inside is that of -log p.
    _, _, grad_hidden, grad_table = _on_mesh(
        vocab_size, chunk, mesh, learns, hidden, table, targets, mask, -cotangent
    )
    return grad_hidden, _in_place(grad_table, table, mesh), None, None


_log_probs.defvjp(_log_probs_forward, _log_probs_backward, symbolic_zeros=True)


def _forward(vocab_size, chunk, mesh, hidden, table, targets, mask):
    learns = tuple(one.perturbed for one in table)
    hidden, table, targets, mask = jax.tree.map(
        lambda primal: primal.value, (hidden, table, targets, mask)
    )
    nats, correct, grad_hidden, grad_table = _on_mesh(
        vocab_size, chunk, mesh, learns, hidden, table, targets, mask
    )
    return (nats, correct), (grad_hidden, _in_place(grad_table, table, mesh))


def _in_place(grad_table, table: Factors, mesh: Mesh | AbstractMesh):
    """The tables' gradients in each table's own precision, and back where it lies."""
    # An adapter's rank is not split.
    places = [TABLE, *[PartitionSpec(TABLE[0])] * (len(table) - 1)]
    return tuple(
        (
            grad
            if grad is None
            else jax.lax.with_sharding_constraint(
                grad.astype(one.dtype), NamedSharding(mesh, place)
            )
        )
        for grad, one, place in zip(grad_table, table, places, strict=True)
    )


def _backward(vocab_size, chunk, mesh, grads, cotangents):
    # The other cotangent is that of a count, which has no gradient.
    of_nats = cotangents[0]
    hidden, table = jax.tree.map(lambda grad: (grad * of_nats).astype(grad.dtype), grads)
    return hidden, table, None, None


# `symbolic_zeros` says which tables are differentiated at all (`perturbed`): a frozen head, as in
# LoRA, costs no product for its gradient.
_cross_entropy.defvjp(_forward, _backward, symbolic_zeros=True)


def _on_mesh(vocab_size, chunk, mesh, learns, hidden, table, targets, mask, weights=None):
    """Sums, and unless `learns` is None the gradients of hidden states and of tables that learn
    (float32, split over the vocabulary): of the sum, in which each target counts `weights` times.
    """
    table = _in_shares(table, hidden, mesh)
    grad_specs = (
        ()
        if learns is None
        else (ROWS, tuple(PartitionSpec(VOCABULARY) if one else None for one in learns))
    )
    return jax.shard_map(
        partial(_on_device, vocab_size, chunk, learns),
        mesh=mesh,
        in_specs=(ROWS, PartitionSpec(VOCABULARY), ROWS, ROWS, ROWS),
        out_specs=(PartitionSpec(), PartitionSpec(), *grad_specs),
        # The sums inside make the outputs equal on all devices, which JAX cannot see by itself.
        check_vma=False,
    )(hidden, table, targets, mask, weights)


def _on_device(vocab_size, chunk, learns, hidden_BTD, table_VD, targets_BT, mask_BT, weights_BT):
    """What one device does: its share of the vocabulary, for every row of its group."""
    B, T = targets_BT.shape
    share = table_VD[0].shape[0]
    classes_V = jax.lax.axis_index(VOCABULARY) * share + jnp.arange(share)
    # The tokens that count come first in each row, so that the chunks behind them, a prompt's share
    # of the work, are left out.
    order_BT = jnp.argsort(~mask_BT, axis=1, stable=True)
    of_chunks = jax.tree.map(
        lambda x: _chunks(
            jnp.take_along_axis(x, order_BT.reshape(B, T, *(1,) * (x.ndim - 2)), axis=1), chunk
        ),
        (hidden_BTD, targets_BT, mask_BT, weights_BT),
    )
    # The same number on all devices, for all take part in what is exchanged.
    most = jax.lax.pmax(jnp.max(jnp.sum(mask_BT, axis=1)), (*REPEATS, *VOCABULARY))

    def step(i, carry):
        nats, correct, grad_table_VD, grads = carry
        rows = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), of_chunks)
        hidden_BCD, targets_BC, mask_BC, weights_BC = jax.tree.map(_gather_rows, rows)
        logits_BCV, is_target_BCV, of_target_BC, logsumexp_BC, rivals_BC = _scores(
            vocab_size, classes_V, hidden_BCD, table_VD, targets_BC
        )
        nats += jnp.sum(jnp.where(mask_BC, logsumexp_BC - of_target_BC, 0.0))
        correct += jnp.sum(mask_BC & (rivals_BC == 0), dtype=jnp.float32)
        if learns is None:
            return nats, correct, grad_table_VD, grads
        # Softmax minus the one-hot target, the gradient of -log p; zero where the mask is False,
        # so that rows of uneven length share chunks.
        grad_BCV = jnp.exp(logits_BCV - logsumexp_BC[..., None]) - is_target_BCV
        if weights_BC is not None:
            grad_BCV *= weights_BC[..., None]
        grad_BCV = jnp.where(mask_BC[..., None], grad_BCV, 0.0).astype(table_VD[0].dtype)

        def to_table(sum_VD, x_BCD):
            return (
                None
                if sum_VD is None
                else sum_VD
                + jnp.einsum("BCV,BCD->VD", grad_BCV, x_BCD, preferred_element_type=jnp.float32)
            )

        def to_hidden(grads, one_VD):
            grad_BCD = jnp.einsum(
                "BCV,VD->BCD", grad_BCV, one_VD, preferred_element_type=jnp.float32
            )
            # PARTS have other classes of the same rows: their parts add up. GROUP has all rows of
            # the group, and each device keeps the sums of its own.
            grad_BCD = jax.lax.psum(grad_BCD, PARTS)
            if GROUP:
                grad_BCD = jax.lax.psum_scatter(grad_BCD, GROUP, scatter_dimension=0, tiled=True)
            return jax.lax.dynamic_update_index_in_dim(grads, grad_BCD.astype(grads.dtype), i, 0)

        return (
            nats,
            correct,
            tuple(map(to_table, grad_table_VD, hidden_BCD)),
            tuple(map(to_hidden, grads, table_VD)),
        )

    no_grads: tuple = (None, None)
    if learns is not None:
        no_grad_table = tuple(
            jnp.zeros(one.shape, jnp.float32) if learn else None
            for one, learn in zip(table_VD, learns, strict=True)
        )
        no_grads = no_grad_table, jax.tree.map(jnp.zeros_like, of_chunks[0])
    start = (jnp.float32(0), jnp.float32(0), *no_grads)
    # How many chunks there are is known only at run time, and JAX does not differentiate such a
    # loop: one more reason to make the gradients inside it.
    nats, correct, grad_table_VD, grads = jax.lax.fori_loop(0, -(-most // chunk), step, start)
    # Every device of a group has the same sums, for all of the group's rows.
    nats, correct = jax.lax.psum((nats, correct), REPEATS)
    if learns is None:
        return nats, correct
    # The inverse of a permutation: where each token went.
    back_BT1 = jnp.argsort(order_BT, axis=1)[..., None]
    grad_BTD = tuple(
        jnp.take_along_axis(jnp.moveaxis(grad, 0, 1).reshape(B, T, -1), back_BT1, axis=1)
        for grad in grads
    )
    return nats, correct, grad_BTD, jax.lax.psum(grad_table_VD, REPEATS)


def _gather_rows(x):
    """The rows of all devices of a group, from each one's own."""
    return jax.lax.all_gather(x, GROUP, axis=0, tiled=True) if GROUP else x


def _in_shares(table: Factors, hidden: Factors, mesh: Mesh | AbstractMesh) -> Factors:
    """The tables in the hidden states' type, split over the vocabulary."""
    # Cast before it moves between devices: half the bytes in bfloat16.
    share = NamedSharding(mesh, PartitionSpec(VOCABULARY))
    return tuple(
        jax.lax.with_sharding_constraint(one.astype(hidden[0].dtype), share) for one in table
    )


def chunked_ranks(
    hidden_BTD: jax.Array | Factors,
    table_VD: jax.Array | Factors,
    targets_BT: jax.Array,
    *,
    vocab_size: int,
    chunk: int,
    mesh: Mesh | AbstractMesh | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Token by token: -log p(target) in nats, float32 [B, T], and how many other tokens are at
    least as likely as the target, int32 [B, T].

    For validation, in chunks and split over the mesh as above: a target is among the ten most
    probable where fewer than ten others are at least as likely.
    """
    mesh = mesh or make_mesh(1, 1, 1, devices=jax.devices()[:1])
    hidden, table = _tuple(hidden_BTD), _in_shares(_tuple(table_VD), _tuple(hidden_BTD), mesh)
    return jax.shard_map(
        partial(_ranks_on_device, vocab_size, chunk),
        mesh=mesh,
        in_specs=(ROWS, PartitionSpec(VOCABULARY), ROWS),
        out_specs=(ROWS, ROWS),
        check_vma=False,
    )(hidden, table, targets_BT)


def _ranks_on_device(vocab_size, chunk, hidden_BTD, table_VD, targets_BT):
    """As `_on_device`; each device keeps what concerns its own rows."""
    B = len(targets_BT)
    share = table_VD[0].shape[0]
    classes_V = jax.lax.axis_index(VOCABULARY) * share + jnp.arange(share)

    def step(_, chunk_of_rows):
        hidden_BCD, targets_BC = jax.tree.map(_gather_rows, chunk_of_rows)
        _, _, of_target_BC, logsumexp_BC, rivals_BC = _scores(
            vocab_size, classes_V, hidden_BCD, table_VD, targets_BC
        )
        first_row = jax.lax.axis_index(GROUP) * B if GROUP else 0
        return None, tuple(
            jax.lax.dynamic_slice_in_dim(x, first_row, B)
            for x in (logsumexp_BC - of_target_BC, rivals_BC)
        )

    _, of_chunks = jax.lax.scan(
        step, None, jax.tree.map(partial(_chunks, chunk=chunk), (hidden_BTD, targets_BT))
    )
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(targets_BT.shape), of_chunks)


def _scores(vocab_size, classes_V, hidden_BCD, table_VD, targets_BC):
    """One chunk's scores for this device's classes, and which of them are the targets; and over all
    classes the target's score, the logarithm of the sum of exponentials, and how many other classes
    score at least as high as the target.
    """
    products = zip(hidden_BCD, table_VD, strict=True)
    logits_BCV = sum(
        jnp.einsum("BCD,VD->BCV", x, one, preferred_element_type=jnp.float32) for x, one in products
    )
    logits_BCV = jnp.where(classes_V < vocab_size, logits_BCV, -jnp.inf)
    is_target_BCV = classes_V == targets_BC[..., None]
    of_target_BC = jax.lax.psum(
        jnp.sum(jnp.where(is_target_BCV, logits_BCV, 0.0), axis=-1), VOCABULARY
    )
    # The largest score of all devices is taken off before exp, so that nothing overflows.
    top_BC = jax.lax.pmax(jnp.max(logits_BCV, axis=-1), VOCABULARY)
    exp_sum_BC = jax.lax.psum(jnp.sum(jnp.exp(logits_BCV - top_BC[..., None]), axis=-1), VOCABULARY)
    # Ties count against the target: where a damaged model gives all classes one score, its accuracy
    # is 0, not 1. So does a target whose score is not a number.
    rival_BCV = ~(logits_BCV < of_target_BC[..., None]) & ~is_target_BCV
    rival_BCV &= classes_V < vocab_size
    rivals_BC = jax.lax.psum(jnp.sum(rival_BCV, axis=-1, dtype=jnp.int32), VOCABULARY)
    return logits_BCV, is_target_BCV, of_target_BC, top_BC + jnp.log(exp_sum_BC), rivals_BC


def _chunks(x, chunk):
    """[B, T, ...] as [T / chunk, B, chunk, ...], to scan over."""
    return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)
