"""GRPO against TRL, on the same model and tokens, and packed rows against rows of one speech."""

import copy

import jax
import numpy as np
import pytest
import torch
from reference import config_of, grads_of, hf_llama, params_of
from trl.trainer.utils import add_fused_lm_head, nanstd
from trl_losses import grpo_loss
from twenty_steps import OPTIMIZER, STEPS, updates_in_torch

from llasa_jax.align.grpo import GrpoLoss, advantages
from llasa_jax.align.settings import GrpoSettings
from llasa_jax.data.batching.rows import row_of
from llasa_jax.model.settings import ModelSettings
from llasa_jax.model.sharding import make_mesh
from llasa_jax.speech.prompts import Example
from llasa_jax.train.optimizer import make_optimizer
from llasa_jax.train.step import TrainStep

LENGTH = 64
VALUES = ("advantage", "old", "reference")
# TRL's names of the variants, each at a temperature of its own.
TRL = {
    "grpo": {"normalize": "speeches", "kl": 0.3, "updates": 2, "temperature": 1.25},
    "dapo": {"normalize": "tokens", "epsilon_high": 0.28, "updates": 2, "temperature": 0.8},
    "dr_grpo": {"normalize": "length", "updates": 1, "temperature": 1.0},
}


def example(prompt, said, advantage, old, reference):
    tokens = np.concatenate([prompt, said]).astype(np.int32)
    loss = np.arange(len(tokens)) >= len(prompt)
    values = {}
    for name, value in zip(VALUES, (advantage, old, reference), strict=True):
        values[name] = np.zeros(len(tokens), np.float32)
        values[name][loss] = value
    return Example(tokens, loss, np.ones(len(tokens), bool), values=values)


def batch_of(rows):
    rows = [row_of(row, LENGTH, VALUES) for row in rows]
    return {name: np.stack([row[name] for row in rows])[None] for name in rows[0]}


def new_step(mesh=None, **settings):
    return TrainStep(
        config_of(hf_llama()),
        ModelSettings(dtype="float32", loss_chunk=16),
        make_optimizer(OPTIMIZER, STEPS),
        mesh or make_mesh(1, 1, 1, devices=jax.devices()[:1]),
        loss=GrpoLoss(GrpoSettings(**settings)),
    )


@pytest.fixture(scope="module")
def speeches():
    """Seven speeches in rows, of uneven lengths, some with ratios beyond the clip."""
    model, rng = hf_llama(), np.random.default_rng(0)
    found = []
    for advantage in (1.2, -0.7, 0.4, -1.5, 0.9, 2.0, -0.1):
        prompt, said = (rng.integers(1, 300, rng.integers(3, 12)) for _ in range(2))
        ids = torch.tensor(np.concatenate([prompt, said]))[None]
        with torch.no_grad():
            log_probs = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        now = log_probs[range(len(said)), torch.tensor(said)].numpy()
        old, reference = (now + rng.normal(0, 0.3, len(said)).astype(np.float32) for _ in range(2))
        found.append((prompt, said, advantage, old, reference))
    return found


@pytest.fixture(scope="module")
def ours(speeches):
    """The loss, its gradients and its numbers, form by form, in one program."""
    step = new_step()
    examples = [example(*each) for each in speeches]
    batch = batch_of([examples[:3], examples[3:4], examples[4:]])
    rows = {name: x[0] for name, x in batch.items()}

    def run(params):
        out, back = jax.vjp(lambda params: step._scores({}, params, rows)[1:], params)
        found = {}
        for form, settings in TRL.items():
            loss = GrpoLoss(GrpoSettings(**settings))

            def of(out, loss=loss):
                return loss.shares(rows, loss.totals(batch), *out, **step._sizes)

            (value, numbers), cotangent = jax.value_and_grad(of, has_aux=True)(out)
            found[form] = value, back(cotangent)[0], numbers
        return found

    return jax.jit(run)(params_of(hf_llama()))


def trl_model(form):
    """As `GRPOTrainer` makes it ready."""
    model, temperature = copy.deepcopy(hf_llama()), TRL[form]["temperature"]
    outputs = "log_probs", "entropy", "mean_logits", "is_top1"
    add_fused_lm_head(model, temperature=temperature, outputs=outputs)
    return model


def loss_of_trl(model, speeches, form):
    settings = GrpoSettings(**TRL[form])
    epsilons = settings.epsilon_low, settings.epsilon_high
    given = [
        (*map(list, (prompt, said)), advantage, list(old) if settings.updates > 1 else None, ref)
        for prompt, said, advantage, old, ref in speeches
    ]
    return grpo_loss(model, given, form, LENGTH, epsilons, settings.kl)


@pytest.mark.parametrize("form", TRL)
def test_loss_and_gradients_equal_trl(form, speeches, ours):
    settings, model = GrpoSettings(**TRL[form]), trl_model(form)
    theirs = loss_of_trl(model, speeches, form)
    theirs.backward()
    loss, grads, numbers = ours[form]
    # Dr. GRPO's loss is a sum of advantages before the first update, near 0.
    np.testing.assert_allclose(loss, theirs.item(), rtol=1e-5, atol=1e-7)
    assert (numbers["clipped"] > 0.1) == (settings.updates > 1)
    largest = max(np.abs(grad).max() for grad in jax.tree.leaves(grads))
    assert largest > 1e-3
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * largest), grads, grads_of(model)
    )


def test_log_probs_are_at_the_temperature_of_the_sampling(speeches):
    """Those that `old` and `reference` are, of transformers' logits."""
    model, batch = hf_llama(), batch_of([[example(*each)] for each in speeches])
    found = np.asarray(new_step(temperature=0.8).log_probs({}, params_of(model), batch))[0]
    for row, (prompt, said, *_) in zip(found, speeches, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor(np.concatenate([prompt, said]))[None]).logits[0]
        theirs = (logits[len(prompt) - 1 : -1] / 0.8).log_softmax(-1)[range(len(said)), said]
        np.testing.assert_allclose(row[len(prompt) - 1 :][: len(said)], theirs, atol=1e-5)


@pytest.mark.soak
def test_packed_rows_on_a_mesh_equal_padded_ones(speeches):
    """Two micro-batches of four rows on eight devices, against a row for every speech on one."""
    examples = [example(*each) for each in speeches]
    packed = batch_of([examples[:3], [], [], examples[3:4], [], examples[4:], [], []])
    packed = {name: x.reshape(2, 4, -1) for name, x in packed.items()}
    padded = batch_of([[one] for one in examples])
    found = []
    for mesh, batch in ((make_mesh(2, 2, 2), packed), (None, padded)):
        step = new_step(mesh, **TRL["grpo"])
        places = jax.tree.map(lambda leaf: leaf.sharding, step.trainable)
        params = jax.device_put(params_of(hf_llama()), places)
        state = step.init(params)
        placed = jax.device_put(batch, step.batch_sharding)
        params, _, numbers = step.train({}, params, state, placed)
        found.append((jax.device_get(numbers), jax.device_get(params)))
    (ours, params), (alone, params_alone) = found
    for name in ours.keys() - {"fill"}:
        np.testing.assert_allclose(ours[name], alone[name], rtol=2e-5, atol=1e-6, err_msg=name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), params, params_alone)


@pytest.mark.soak
@pytest.mark.parametrize("form", TRL)
def test_twenty_steps_equal_trl(form):
    """Rounds of two texts and four speeches of each, trained on as often as the form does."""
    model, step, rng = trl_model(form), new_step(**TRL[form]), np.random.default_rng(0)
    update, start, params = updates_in_torch(model), params_of(hf_llama()), params_of(hf_llama())
    state, clipped = step.init(params), []

    def draw():
        return rng.integers(1, 300, rng.integers(3, 12))

    for number in range(STEPS):
        if number % TRL[form]["updates"] == 0:
            texts = [draw(), draw()]
            drawn = [(text, draw()) for text in texts for _ in range(4)]
            rated = advantages(rng.random((2, 4))).ravel()
            alone = batch_of([[example(*each, 0.0, 0.0, 0.0)] for each in drawn])
            known = [np.asarray(step.log_probs({}, of, alone))[0] for of in (params, start)]
            speeches = [
                (prompt, said, advantage, *(x[at, len(prompt) - 1 :][: len(said)] for x in known))
                for at, ((prompt, said), advantage) in enumerate(zip(drawn, rated, strict=True))
            ]
        examples = [example(*each) for each in speeches]
        batch = batch_of([examples[:3], examples[3:5], examples[5:]])
        params, state, numbers = step.train({}, params, state, batch)
        theirs = loss_of_trl(model, speeches, form)
        norm = update(theirs)
        np.testing.assert_allclose(numbers["loss"], theirs.item(), atol=1e-4)
        np.testing.assert_allclose(numbers["grad_norm"], norm, rtol=1e-3)
        clipped.append(numbers["clipped"])
    assert (max(clipped) > 0.1) == (TRL[form]["updates"] > 1)


def test_advantages_are_those_of_trl():
    rewards = np.random.default_rng(0).normal(size=(3, 5))
    torched = torch.tensor(rewards)
    centred = torched - torched.mean(1, keepdim=True)
    theirs = centred / (nanstd(torched, 1, keepdim=True) + 1e-4)
    np.testing.assert_allclose(advantages(rewards), theirs, rtol=1e-12)
    np.testing.assert_allclose(advantages(rewards, scale=False), centred, rtol=1e-12)
    assert not advantages(np.ones((1, 4))).any()
