"""DPO against TRL, on the same model and tokens, and packed rows against rows of one pair."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from reference import config_of, grads_of, hf_llama, params_of
from trl_losses import dpo_loss, dpo_trainer
from twenty_steps import OPTIMIZER, STEPS, updates_in_torch

from llasa_jax.align.dpo import DpoLoss
from llasa_jax.align.settings import DpoSettings
from llasa_jax.data.batching.rows import row_of
from llasa_jax.model.settings import ModelSettings
from llasa_jax.model.sharding import make_mesh
from llasa_jax.speech.prompts import Example
from llasa_jax.train.optimizer import make_optimizer
from llasa_jax.train.step import TrainStep

LENGTH = 96


def make_pairs(count, seed=0):
    """(prompt, better, worse) of token ids, of uneven lengths."""
    rng = np.random.default_rng(seed)
    return [[rng.integers(1, 300, rng.integers(3, 12)) for _ in range(3)] for _ in range(count)]


def example(pair, reference=(0.0, 0.0)):
    prompt, *speeches = pair
    parts = [np.concatenate([prompt, speech]).astype(np.int32) for speech in speeches]
    loss = [np.arange(len(part)) >= len(prompt) for part in parts]
    values = [np.zeros(len(part), np.float32) for part in parts]
    for value, number in zip(values, reference, strict=True):
        value[-1] = number
    return Example(
        np.concatenate(parts),
        np.concatenate(loss),
        np.ones(sum(map(len, parts)), bool),
        tuple(map(len, parts)),
        {"reference": np.concatenate(values)},
    )


def batch_of(rows, length=LENGTH):
    """Rows of examples as a batch of one micro-batch."""
    rows = [row_of(row, length, ("reference",)) for row in rows]
    return {name: np.stack([row[name] for row in rows])[None] for name in rows[0]}


def new_step(mesh=None, **settings):
    return TrainStep(
        config_of(hf_llama()),
        ModelSettings(dtype="float32", loss_chunk=16),
        make_optimizer(OPTIMIZER, STEPS),
        mesh or make_mesh(1, 1, 1, devices=jax.devices()[:1]),
        loss=DpoLoss(DpoSettings(**settings)),
    )


@pytest.fixture(scope="module")
def models():
    """The model, and another one as reference, which differs from it by a little."""
    model, reference = hf_llama(), hf_llama()
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in reference.parameters():
            weight.add_(0.02 * torch.randn_like(weight))
    return model, reference


@pytest.fixture(scope="module")
def rows(models):
    """Seven pairs in three rows, with the reference's log-probabilities as our step finds them."""
    pairs = make_pairs(7)
    batch = batch_of([[example(pair)] for pair in pairs])
    known = np.asarray(new_step().log_probs({}, params_of(models[1]), batch))[0]
    found = referenced(pairs, known)
    return pairs, [found[:3], found[3:4], found[4:]]


def referenced(pairs, log_probs):
    """Examples with their reference, of the log-probabilities of rows of one pair each."""
    found = []
    for pair, row in zip(pairs, log_probs, strict=True):
        second = len(pair[0]) + len(pair[1])
        found.append(example(pair, (row[: second - 1].sum(), row[second:].sum())))
    return found


TRL = {
    "sigmoid": ({}, ("sigmoid",)),
    "ipo": ({"form": "ipo", "beta": 0.5}, ("ipo",)),
    "normalized": ({"length_normalized": True, "beta": 2.0}, ("sigmoid_norm",)),
    "supervised": ({"supervised": 0.3}, ("sigmoid", "sft")),
    "smoothed": ({"label_smoothing": 0.2}, ("sigmoid",)),
}


@pytest.fixture(scope="module")
def ours(models, rows):
    """The loss and its gradients, form by form, in one program with one pass through the model."""
    step, batch = new_step(), batch_of(rows[1])

    def run(params):
        def factors(params):
            return step._scores({}, params, {name: x[0] for name, x in batch.items()})[1:]

        out, back = jax.vjp(factors, params)
        losses, cotangents = [], []
        for settings, _ in TRL.values():
            loss = DpoLoss(DpoSettings(**settings))

            def of(out, loss=loss):
                rows = {name: x[0] for name, x in batch.items()}
                return loss.shares(rows, loss.totals(batch), *out, **step._sizes)[0]

            value, cotangent = jax.value_and_grad(of)(out)
            losses.append(value)
            cotangents.append(cotangent)
        return losses, jax.vmap(back)(jax.tree.map(lambda *x: jnp.stack(x), *cotangents))[0]

    losses, grads = jax.jit(run)(params_of(models[0]))
    return {
        form: (losses[at], jax.tree.map(lambda x, at=at: x[at], grads))
        for at, form in enumerate(TRL)
    }


@pytest.mark.parametrize("form", TRL)
def test_loss_and_gradients_equal_trl(form, models, rows, ours):
    settings, loss_types = TRL[form]
    model, reference = copy.deepcopy(models)
    weights = [1.0, settings.get("supervised", 0.0)][: len(loss_types)]
    trainer = dpo_trainer(model, reference, loss_types, weights, settings.get("beta", 0.1))
    theirs = dpo_loss(trainer, rows[0])
    if flipped := settings.get("label_smoothing"):
        # TRL has none for this form: the share of the pairs is ranked the other way round.
        swapped = [(prompt, worse, better) for prompt, better, worse in rows[0]]
        theirs = (1 - flipped) * theirs + flipped * dpo_loss(trainer, swapped)
    theirs.backward()
    loss, grads = ours[form]
    np.testing.assert_allclose(loss, theirs.item(), rtol=1e-5)
    largest = max(np.abs(grad).max() for grad in jax.tree.leaves(grads))
    assert largest > 1e-2
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * max(1, largest)),
        grads,
        grads_of(model),
    )


def test_packed_rows_on_a_mesh_equal_padded_ones(models, rows):
    """Two micro-batches of four rows on eight devices, against a row for every pair on one."""
    packed = batch_of([rows[1][0], [], [], rows[1][1], [], rows[1][2], [], []])
    packed = {name: x.reshape(2, 4, -1) for name, x in packed.items()}
    padded = batch_of([[one] for row in rows[1] for one in row])
    found = []
    for mesh, batch in ((make_mesh(2, 2, 2), packed), (None, padded)):
        step = new_step(mesh, supervised=0.3)
        places = jax.tree.map(lambda leaf: leaf.sharding, step.trainable)
        params = jax.device_put(params_of(models[0]), places)
        state = step.init(params)
        placed = jax.device_put(batch, step.batch_sharding)
        params, _, numbers = step.train({}, params, state, placed)
        found.append((jax.device_get(numbers), jax.device_get(params)))
    (ours, params), (alone, params_alone) = found
    for name in ours.keys() - {"fill"}:
        np.testing.assert_allclose(ours[name], alone[name], rtol=2e-5, atol=1e-6, err_msg=name)
    assert 0 < ours["accuracy"] < 1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), params, params_alone)


@pytest.mark.soak
def test_twenty_steps_equal_trl(models):
    model, reference = copy.deepcopy(models)
    trainer = dpo_trainer(model, reference)
    step = new_step()
    params = params_of(models[0])
    state, start = step.init(params), params_of(models[1])
    update = updates_in_torch(model)
    for number in range(STEPS):
        pairs = make_pairs(4, seed=number)
        known = np.asarray(step.log_probs({}, start, batch_of([[example(p)] for p in pairs])))[0]
        batch = batch_of([referenced(pairs[:2], known[:2]), referenced(pairs[2:], known[2:])])
        params, state, numbers = step.train({}, params, state, batch)
        theirs = dpo_loss(trainer, pairs)
        norm = update(theirs)
        np.testing.assert_allclose(numbers["loss"], theirs.item(), atol=1e-4)
        np.testing.assert_allclose(numbers["grad_norm"], norm, rtol=1e-3)
