"""The train step against PyTorch: HF's LLaMA, `torch.optim.AdamW`, HF's schedule, torch's clipping.
And against itself on other meshes.
"""

import dataclasses
import math

import jax
import numpy as np
import optax
import pytest
import torch
from reference import config_of, hf_llama, our_tree, params_of
from transformers import TrainingArguments, get_cosine_schedule_with_warmup
from twenty_steps import (
    LENGTH,
    OPTIMIZER,
    ROWS,
    STEPS,
    make_batches,
    train,
    train_in_torch,
)

from llasa_jax.model.settings import ModelSettings
from llasa_jax.model.sharding import abstract_params, make_mesh, parameter_shardings
from llasa_jax.train.offload import place_state
from llasa_jax.train.optimizer import SCALES, learning_rate_schedule, make_optimizer
from llasa_jax.train.step import TrainStep


@pytest.mark.parametrize("tied", [True, False])
def test_twenty_steps_equal_torch(tied):
    hf = hf_llama(tied=tied)
    ours, params = train(hf, make_mesh(1, 1, 1, devices=jax.devices()[:1]))
    theirs = train_in_torch(hf)
    # Float32 round-off, which Adam's division by small second moments enlarges from step to step.
    np.testing.assert_allclose([m["loss"] for m in ours], [m["loss"] for m in theirs], atol=1e-4)
    np.testing.assert_allclose(
        [m["grad_norm"] for m in ours], [m["grad_norm"] for m in theirs], rtol=1e-3
    )
    assert ours[-1]["loss"] < ours[0]["loss"] - 0.1
    state = {name: tensor.detach().numpy() for name, tensor in hf.state_dict().items()}
    after = our_tree(state.__getitem__, config_of(hf))
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), after, params_of(hf_llama(tied=tied)))
    assert min(jax.tree.leaves(moved)) > 1e-3
    for (path, mine), its in zip(
        jax.tree.leaves_with_path(params), jax.tree.leaves(after), strict=True
    ):
        np.testing.assert_allclose(mine, its, atol=1e-3, err_msg=str(path))


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 4, 2), (2, 4, 1)])
def test_every_mesh_gives_the_same_numbers(shape):
    one, params_of_one = train(hf_llama(), make_mesh(1, 1, 1, devices=jax.devices()[:1]), steps=3)
    many, params_of_many = train(hf_llama(), make_mesh(*shape), steps=3)
    for name in one[0]:
        np.testing.assert_allclose(
            [m[name] for m in many], [m[name] for m in one], rtol=2e-5, err_msg=name
        )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), params_of_many, params_of_one
    )


def test_state_lies_with_its_parameters():
    hf = hf_llama()
    functions = TrainStep(
        config_of(hf), ModelSettings(), make_optimizer(OPTIMIZER, STEPS), make_mesh(2, 2, 2)
    )
    opt_state = functions.init(
        jax.device_put(params_of(hf), parameter_shardings(config_of(hf), functions.mesh))
    )
    sizes = [
        leaf.addressable_shards[0].data.size / leaf.size
        for leaf in jax.tree.leaves(opt_state)
        if leaf.ndim > 2
    ]
    assert sizes
    assert set(sizes) == {0.25}


@pytest.mark.parametrize("remat", ["full", "offload"])
def test_remat_changes_nothing(remat):
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    plain, _ = train(hf_llama(), mesh, steps=3, remat="none")
    again, _ = train(hf_llama(), mesh, steps=3, remat=remat)
    np.testing.assert_allclose([m["loss"] for m in plain], [m["loss"] for m in again], rtol=1e-6)


def test_offload_keeps_the_layers_inputs_on_the_host():
    """The forward pass of the traced step sends them there; nothing of their size comes out of its
    loop over the layers.
    """
    config = config_of(hf_llama())
    kept = {}
    for remat in ("full", "offload"):
        step = TrainStep(
            config,
            ModelSettings(remat=remat, loss_chunk=16),
            make_optimizer(OPTIMIZER, STEPS),
            make_mesh(),
        )
        batch = {
            name: jax.ShapeDtypeStruct((1, ROWS, LENGTH), dtype)
            for name, dtype in step.BATCH.items()
        }
        kept[remat] = str(
            step.train.trace(step.frozen, step.trainable, step.opt_state, batch).jaxpr
        ).count(f"bf16<host>[{config.num_hidden_layers},")
    assert kept["full"] == 0
    assert kept["offload"] > 0


def five_updates(mesh, **changes):
    """The sum of five updates for the same random gradients on any mesh, and the optimizer's state
    after.
    """
    settings = dataclasses.replace(OPTIMIZER, warmup_ratio=0.0, **changes)
    optimizer = optax.with_extra_args_support(make_optimizer(settings, STEPS))
    params = abstract_params(config_of(hf_llama()), mesh, np.float32)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, params)
    state_shardings = jax.tree.map(
        lambda leaf: leaf.sharding,
        place_state(jax.eval_shape(optimizer.init, params), params, offload=settings.offload),
    )
    rng = np.random.default_rng(0)
    ones = jax.device_put(
        jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), params), shardings
    )
    state = jax.jit(optimizer.init, out_shardings=state_shardings)(ones)
    update = jax.jit(
        lambda grads, state: optimizer.update(grads, state, ones, shardings=shardings),
        out_shardings=(shardings, state_shardings),
    )
    total = jax.tree.map(np.zeros_like, ones)
    for _ in range(5):
        grads = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), params)
        updates, state = update(jax.device_put(grads, shardings), state)
        total = jax.tree.map(np.add, total, jax.device_get(updates))
    return total, state


def close(ours, theirs, **tolerance):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(np.asarray(a), np.asarray(b), **tolerance),
        ours,
        theirs,
    )


@pytest.mark.parametrize("name", sorted(SCALES))
def test_every_optimizer_is_the_same_on_every_mesh(name):
    one, _ = five_updates(make_mesh(1, 1, 1, devices=jax.devices()[:1]), name=name)
    many, state = five_updates(make_mesh(2, 2, 2), name=name)
    # Float32 sums in another order; Lion's signs may turn where an interpolated gradient is nothing
    # but that.
    close(many, one, rtol=1e-4, atol=1e-7)
    if name != "adafactor":
        assert {
            x.addressable_shards[0].data.size / x.size for x in jax.tree.leaves(state) if x.ndim > 2
        } == {0.25}


@pytest.mark.parametrize("name", sorted({*SCALES} - {"adafactor"}))
def test_state_on_the_host_changes_nothing(name):
    on_device, expected = five_updates(make_mesh(2, 2, 2), name=name)
    on_host, state = five_updates(make_mesh(2, 2, 2), name=name, offload=True)
    # The same arithmetic, which the compiler fuses otherwise.
    close(on_host, on_device, rtol=1e-5, atol=1e-8)
    close(state, expected, rtol=1e-5, atol=1e-8)
    for mine, its in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        assert mine.sharding.memory_kind == ("pinned_host" if mine.ndim else "device")
        assert mine.sharding.spec == its.sharding.spec


def test_state_in_bfloat16():
    full, _ = five_updates(make_mesh())
    half, state = five_updates(make_mesh(), state_dtype="bfloat16")
    assert {str(x.dtype) for x in jax.tree.leaves(state) if x.ndim} == {"bfloat16"}
    # Five steps of about the learning rate, each of moments rounded to one part in 256.
    close(half, full, atol=5 * OPTIMIZER.learning_rate * 0.03)
    assert any(
        np.any(a != b) for a, b in zip(jax.tree.leaves(half), jax.tree.leaves(full), strict=True)
    )


@pytest.mark.parametrize("name", ["sgd", "adagrad"])
def test_plainer_optimizers_equal_torch(name):
    settings = dataclasses.replace(
        OPTIMIZER, name=name, schedule="constant", warmup_ratio=0.0, weight_decay=0.0, clip=0.0
    )
    weight = torch.nn.Parameter(torch.linspace(-1, 1, 7))
    theirs = (
        torch.optim.SGD([weight], settings.learning_rate, settings.beta1)
        if name == "sgd"
        else torch.optim.Adagrad([weight], settings.learning_rate, eps=settings.eps)
    )
    params = {"embed": jax.numpy.array(weight.detach().numpy())}
    ours = make_optimizer(settings, STEPS)
    state = ours.init(params)
    for _ in range(5):
        theirs.zero_grad()
        (weight**4).sum().backward()
        updates, state = ours.update({"embed": 4 * params["embed"] ** 3}, state, params)
        theirs.step()
        params = {"embed": params["embed"] + updates["embed"]}
    np.testing.assert_allclose(params["embed"], weight.detach(), rtol=1e-5, atol=1e-7)


def test_the_program_does_not_grow_with_the_layers():
    def lines(layers):
        config = dataclasses.replace(config_of(hf_llama()), num_hidden_layers=layers)
        step = TrainStep(
            config, ModelSettings(loss_chunk=16), make_optimizer(OPTIMIZER, STEPS), make_mesh()
        )
        return len(step.compile(1, ROWS, LENGTH).as_text().splitlines())

    # Same loops over more layers; the optimizer's fusions may differ a little.
    assert abs(lines(12) / lines(3) - 1) < 0.05


def test_validation_averages_the_same_loss_and_counts_codes():
    hf = hf_llama()
    mesh = make_mesh()
    codes = range(200, 280)
    settings = ModelSettings(dtype="float32", loss_chunk=16)
    functions = TrainStep(config_of(hf), settings, make_optimizer(OPTIMIZER, STEPS), mesh, codes)
    params = jax.device_put(params_of(hf), parameter_shardings(config_of(hf), mesh))
    batch = next(make_batches())
    sums = functions.validate({}, params, jax.device_put(batch, functions.batch_sharding))
    with torch.no_grad():
        hits = {1: 0, 10: 0}
        for tokens, learns in zip(
            batch["tokens"].reshape(-1, LENGTH),
            np.roll(batch["loss_mask"], 1, -1).reshape(-1, LENGTH),
            strict=True,
        ):
            for clip in (slice(0, 36), slice(36, 56)):
                best = (
                    hf(torch.from_numpy(tokens[clip]).long()[None])
                    .logits[0, :-1]
                    .topk(10)
                    .indices.numpy()
                )
                target = tokens[clip][1:]
                counted = learns[clip][1:] & (target >= 200) & (target < 280)
                for top in hits:
                    hits[top] += (best[:, :top] == target[:, None]).any(-1)[counted].sum()
    assert (sums["code_top1"], sums["code_top10"]) == (hits[1], hits[10])
    assert 0 < hits[1] < hits[10]
    _, _, metrics = functions.train(
        {}, params, functions.init(params), jax.device_put(batch, functions.batch_sharding)
    )
    np.testing.assert_allclose(sums["nats"] / sums["targets"], metrics["loss"], rtol=1e-6)
    np.testing.assert_allclose(sums["correct"] / sums["targets"], metrics["accuracy"], rtol=1e-6)
    learned_codes = batch["loss_mask"] & (batch["targets"] >= 200) & (batch["targets"] < 280)
    assert sums["codes"] == metrics["codes"] == learned_codes.sum()
    # Two clips of 36 and 20 tokens, in each of which a token attends to all before it and itself.
    np.testing.assert_allclose(metrics["context"], (36 * 37 / 2 + 20 * 21 / 2) / 56, rtol=1e-6)
    np.testing.assert_allclose(metrics["fill"], 56 / 64, rtol=1e-6)


@pytest.mark.parametrize("decay_norms", [False, True])
def test_decay_of_norms_is_a_choice(decay_norms):
    params = {
        "embed": jax.numpy.ones(3),
        "layers": {"attn_norm": jax.numpy.ones(3)},
        "norm": jax.numpy.ones(3),
    }
    settings = dataclasses.replace(OPTIMIZER, warmup_ratio=0.0, decay_norms=decay_norms)
    optimizer = make_optimizer(settings, STEPS)
    still = jax.tree.map(jax.numpy.zeros_like, params)
    updates, _ = optimizer.update(still, optimizer.init(params), params)
    shrinks = -settings.learning_rate * settings.weight_decay
    np.testing.assert_allclose(updates["embed"], shrinks, rtol=1e-6)
    for norm in (updates["norm"], updates["layers"]["attn_norm"]):
        np.testing.assert_allclose(norm, shrinks if decay_norms else 0, rtol=1e-6)


@pytest.mark.parametrize(("steps", "ratio"), [(200, 0.03), (50, 0.2), (20, 0.0), (3, 0.9)])
def test_deepspeeds_schedule(steps, ratio):
    """WarmupCosineLR's formula, restated: warmup_min_ratio 0.03, cos_min_ratio 0.1, at least two
    steps of warm-up.
    """
    warmup = max(2, math.ceil(ratio * steps))
    ours = learning_rate_schedule(
        dataclasses.replace(OPTIMIZER, schedule="deepspeed", warmup_ratio=ratio), steps
    )
    for step in range(steps):
        if step < warmup:
            expected = 0.03 + 0.97 * math.log(step + 1) / math.log(warmup)
        else:
            expected = (
                0.1
                + 0.9
                * (1 + math.cos(math.pi * min(1, (step - warmup + 1) / max(1, steps - warmup))))
                / 2
            )
        np.testing.assert_allclose(ours(step), expected * OPTIMIZER.learning_rate, rtol=1e-4)
    np.testing.assert_allclose(ours(0), 0.03 * OPTIMIZER.learning_rate, rtol=1e-5)
    if steps > warmup:
        np.testing.assert_allclose(ours(steps - 1), 0.1 * OPTIMIZER.learning_rate, rtol=1e-4)


def test_schedules_are_hfs():
    weight = torch.nn.Parameter(torch.zeros(1))
    for ratio in (0.2, 0.0, 0.03):
        settings = dataclasses.replace(OPTIMIZER, warmup_ratio=ratio)
        # HF's Trainer rounds the warm-up's steps up.
        warmup = TrainingArguments("unused", warmup_steps=ratio, use_cpu=True).get_warmup_steps(
            STEPS
        )
        hf = get_cosine_schedule_with_warmup(
            torch.optim.SGD([weight], lr=settings.learning_rate), warmup, STEPS
        )
        ours = learning_rate_schedule(settings, STEPS)
        for step in range(STEPS):
            np.testing.assert_allclose(ours(step), hf.get_last_lr()[0], atol=1e-9)
            hf.optimizer.step()
            hf.step()
    constant = learning_rate_schedule(dataclasses.replace(OPTIMIZER, schedule="constant"), STEPS)
    np.testing.assert_allclose(
        [constant(0), constant(2), constant(4), constant(19)],
        np.array([0, 0.5, 1, 1]) * OPTIMIZER.learning_rate,
    )
