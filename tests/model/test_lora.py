"""LoRA against PEFT around HF's LLaMA: the same start, logits, twenty steps of AdamW, and what is
trained.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from lora_step import one_device, start_of, step_for
from peft import LoraConfig, get_peft_model
from reference import config_of, hf_llama, params_of
from twenty_steps import LENGTH, OPTIMIZER, STEPS, make_batches, train_in_torch

from llasa_jax.errors import UserError
from llasa_jax.model.axes import INPUTS
from llasa_jax.model.lora import adapter_config, count, join
from llasa_jax.model.settings import LoraSettings, ModelSettings
from llasa_jax.model.sharding import make_mesh
from llasa_jax.train.optimizer import make_optimizer
from llasa_jax.train.step import TrainStep

MODULES = {
    "q": "q_proj",
    "k": "k_proj",
    "v": "v_proj",
    "o": "o_proj",
    "gate": "gate_proj",
    "up": "up_proj",
    "down": "down_proj",
    "embed": "embed_tokens",
    "head": "lm_head",
}
PEFT_FACTORS = {
    "a": ("lora_A.default.weight", "lora_embedding_A.default"),
    "b": ("lora_B.default.weight", "lora_embedding_B.default"),
}


def peft_llama(hf, settings: LoraSettings, **options):
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        use_rslora=settings.rslora,
        target_modules=[MODULES[name] for name in settings.targets],
        **options,
    )
    return get_peft_model(hf, config)


def factors_of(peft_model, adapters, abstract):
    """Our `lora` tree from PEFT's model, mapped here by hand."""
    state = {name: tensor.detach().numpy() for name, tensor in peft_model.state_dict().items()}

    def found(name, factor, layer=None):
        where = f".layers.{layer}." if layer is not None else "."
        return next(
            x
            for key, x in state.items()
            if where in key and f"{MODULES[name]}.{PEFT_FACTORS[factor][name == 'embed']}" in key
        )

    tree = {}
    for name in adapters.targets:
        tree[name] = {}
        for factor in "ab":
            shape = abstract["lora"][name][factor].shape
            layers = (
                range(shape[0]) if name in INPUTS and name not in ("embed", "head") else (None,)
            )
            stacked = np.stack([found(name, factor, layer) for layer in layers])
            tree[name][factor] = np.pad(
                stacked.reshape(-1), (0, int(np.prod(shape)) - stacked.size)
            ).reshape(shape)
            if name == "embed" and factor == "a":
                tree[name][factor] = np.pad(stacked[0], ((0, 0), (0, shape[1] - stacked.shape[2])))
    return tree


def randomised(peft_model, seed=0):
    """PEFT's model with factors that are all at work."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, weight in peft_model.named_parameters():
            if weight.requires_grad and "lora_" in name:
                weight.add_(0.1 * torch.randn_like(weight))
    return peft_model


@pytest.mark.parametrize(("tied", "rslora"), [(True, True), (False, False)])
def test_logits_equal_peft(tied, rslora):
    settings = LoraSettings(rank=4, alpha=6.0, dropout=0.0, targets=list(INPUTS), rslora=rslora)
    hf = hf_llama(tied=tied)
    base = params_of(hf)
    step = step_for(hf, settings, one_device())
    theirs = randomised(peft_llama(hf, settings)).eval()
    params = join(*start_of(step, base, factors_of(theirs, step.adapters, step.trainable)))
    tokens = next(make_batches())["tokens"][0]
    positions = np.broadcast_to(np.arange(LENGTH), tokens.shape)
    model = nnx.merge(step.graphdef, params)
    ours = model.logits(model(tokens, positions, jnp.ones_like(tokens)))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens).long()).logits.numpy()
    np.testing.assert_allclose(ours, expected, atol=1e-4)


def train(step, frozen, trainable, steps=STEPS):
    frozen_before = jax.tree.map(np.asarray, frozen)
    opt_state, metrics = step.init(trainable), []
    for batch, _ in zip(make_batches(), range(steps), strict=False):
        trainable, opt_state, numbers = step.train(
            frozen, trainable, opt_state, jax.device_put(batch, step.batch_sharding)
        )
        metrics.append({name: float(value) for name, value in numbers.items()})
    jax.tree.map(np.testing.assert_array_equal, frozen, frozen_before)
    return metrics, jax.device_get(trainable)


def test_twenty_steps_equal_peft():
    settings = LoraSettings(rank=4, alpha=8.0, dropout=0.0, targets=list(INPUTS))
    hf = hf_llama(tied=False)
    base = params_of(hf)
    step = step_for(hf, settings, one_device())
    theirs = peft_llama(hf, settings)
    ours, trained = train(
        step, *start_of(step, base, factors_of(theirs, step.adapters, step.trainable))
    )
    expected = train_in_torch(theirs)
    # Float32 round-off, which Adam's division by small second moments enlarges from step to step.
    np.testing.assert_allclose([m["loss"] for m in ours], [m["loss"] for m in expected], atol=1e-4)
    np.testing.assert_allclose(
        [m["grad_norm"] for m in ours], [m["grad_norm"] for m in expected], rtol=1e-3
    )
    assert ours[-1]["loss"] < ours[0]["loss"] - 0.02
    after = factors_of(theirs, step.adapters, step.trainable)
    for (path, mine), its in zip(
        jax.tree.leaves_with_path(trained["lora"]), jax.tree.leaves(after), strict=True
    ):
        np.testing.assert_allclose(mine, its, atol=1e-3, err_msg=str(path))


def test_twenty_steps_with_norms_and_single_rows_equal_peft():
    settings = LoraSettings(
        rank=2,
        alpha=4.0,
        dropout=0.0,
        targets=["q", "v"],
        train_also=["norms", "token7", "token250"],
    )
    hf = hf_llama(tied=True)
    base = params_of(hf)
    step = step_for(hf, settings, one_device())
    theirs = peft_llama(hf, settings, modules_to_save=["norm"], trainable_token_indices=[7, 250])
    assert count(step.config, step.adapters)[0] == theirs.get_nb_trainable_parameters()[0]
    ours, trained = train(
        step, *start_of(step, base, factors_of(theirs, step.adapters, step.trainable))
    )
    assert {*trained} == {"lora", "rows", "layers", "norm"}
    assert {*trained["layers"]} == {"attn_norm", "mlp_norm"}
    expected = train_in_torch(theirs)
    np.testing.assert_allclose([m["loss"] for m in ours], [m["loss"] for m in expected], atol=1e-4)
    deltas = [
        tensor.detach().numpy()
        for name, tensor in theirs.named_parameters()
        if "trainable_tokens_delta" in name
    ]
    assert np.abs(trained["rows"]["embed"] - base["embed"][[7, 250]]).max() > 1e-2
    (delta,) = deltas
    np.testing.assert_allclose(trained["rows"]["embed"], delta, atol=1e-3)


EVERYTHING = LoraSettings(
    rank=4,
    alpha=8.0,
    dropout=0.2,
    targets=list(INPUTS)[:-2],
    train_also=["norms", "token7", "token250"],
)


@pytest.fixture(scope="module")
def on_one_device():
    step = step_for(hf_llama(tied=False), EVERYTHING, one_device())
    return train(step, *start_of(step, params_of(hf_llama(tied=False))), steps=3)


@pytest.mark.parametrize("shape", [(1, 8, 1), (2, 2, 2)])
def test_every_mesh_gives_the_same_numbers(shape, on_one_device):
    """Dropout included: its masks depend on the seed and the step alone."""
    step = step_for(hf_llama(tied=False), EVERYTHING, make_mesh(*shape))
    many, trained = train(step, *start_of(step, params_of(hf_llama(tied=False))), steps=3)
    for name in many[0]:
        np.testing.assert_allclose(
            [m[name] for m in many], [m[name] for m in on_one_device[0]], rtol=2e-5, err_msg=name
        )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=3e-4), trained, on_one_device[1]
    )


def test_tables_with_adapters_on_a_mesh():
    settings = LoraSettings(rank=3, dropout=0.0, targets=["embed", "head"])
    losses = []
    for mesh in (one_device(), make_mesh(1, 2, 4)):
        step = step_for(hf_llama(kv_heads=4), settings, mesh)
        losses.append(
            [
                m["loss"]
                for m in train(step, *start_of(step, params_of(hf_llama(kv_heads=4))), steps=3)[0]
            ]
        )
    np.testing.assert_allclose(losses[1], losses[0], rtol=2e-5)


def test_dropout_differs_from_step_to_step_and_by_seed_and_is_off_in_validation(on_one_device):
    hf = hf_llama(tied=False)
    plain, seeded = (step_for(hf, EVERYTHING, one_device(), seed=seed) for seed in (0, 1))
    start = start_of(plain, params_of(hf), None)
    # B is zero at first, so that dropping anything would do nothing.
    rng = np.random.default_rng(0)
    start[1]["lora"] = jax.tree.map(
        lambda leaf: jnp.asarray(0.1 * rng.normal(size=leaf.shape).astype(np.float32)),
        start[1]["lora"],
    )
    batch = jax.device_put(next(make_batches()), plain.batch_sharding)

    def loss(step, updates_before=0):
        trainable = jax.tree.map(jnp.copy, start[1])
        opt_state = step.init(trainable)
        opt_state = optax.tree.map_params(
            step.optimizer,
            lambda x: x,
            opt_state,
            transform_non_params=lambda _: jnp.int32(updates_before),
        )
        return float(step.train(start[0], trainable, opt_state, batch)[2]["loss"])

    dropped = loss(plain), loss(plain, 1), loss(seeded)
    assert len({*dropped}) == 3
    assert loss(plain) == dropped[0]
    sums = plain.validate(*start, batch)
    whole = step_for(hf, dataclasses.replace(EVERYTHING, dropout=0.0), one_device())
    np.testing.assert_allclose(sums["nats"] / sums["targets"], loss(whole), rtol=1e-6)
    # Many masks average out: what is kept is scaled up for what is dropped.
    assert abs(np.mean([loss(plain, n) for n in range(8)]) - loss(whole)) < 0.1


@pytest.mark.parametrize("train_also", [[], ["norms"], ["token1"], ["norms", "embed", "head"]])
def test_as_many_parameters_as_peft_trains(train_also):
    settings = LoraSettings(
        rank=4,
        targets=[*INPUTS] if train_also in ([], ["norms"]) else ["q", "down"],
        train_also=train_also,
    )
    hf = hf_llama(tied=False)
    ours = count(config_of(hf), adapter_config(settings, config_of(hf), {"token1": 1}))
    names = {"norms": "norm", "embed": "embed_tokens", "head": "lm_head"}
    modules = [names[name] for name in train_also if name in names] or None
    rows = {"embed_tokens": [1], "lm_head": [1]} if "token1" in train_also else None
    total = sum(weight.numel() for weight in hf.parameters())
    theirs = peft_llama(hf, settings, modules_to_save=modules, trainable_token_indices=rows)
    assert ours[0] == theirs.get_nb_trainable_parameters()[0]
    assert ours[1] == total - (
        sum(w.numel() for n, w in theirs.named_parameters() if "modules_to_save" in n)
    )


def test_a_step_takes_under_half_the_memory():
    """XLA's own account of the compiled step. Of a model whose weights outweigh its activations, as
    a real one's do.
    """
    config = config_of(hf_llama(hidden_size=128, intermediate_size=512, layers=4, vocab=2000))
    peaks = []
    for settings, dtype in ((LoraSettings(), "float32"), (LoraSettings(rank=8), "bfloat16")):
        model = ModelSettings(dtype="bfloat16", loss_chunk=16)
        adapters = adapter_config(settings, config, {})
        step = TrainStep(
            config,
            model,
            make_optimizer(OPTIMIZER, 9),
            one_device(),
            adapters=adapters,
            frozen_dtype=dtype,
        )
        analysis = step.compile(1, 1, 64).memory_analysis()
        given_and_kept = (
            analysis.argument_size_in_bytes
            + analysis.output_size_in_bytes
            - analysis.alias_size_in_bytes
        )
        peaks.append(given_and_kept + analysis.temp_size_in_bytes)
    assert peaks[1] < peaks[0] / 2, peaks


def test_a_frozen_table_has_no_gradient():
    config = config_of(hf_llama(vocab=5000))
    step = TrainStep(
        config,
        ModelSettings(dtype="bfloat16", loss_chunk=16),
        make_optimizer(OPTIMIZER, 9),
        one_device(),
        adapters=adapter_config(LoraSettings(rank=4), config, {}),
    )
    jaxpr = str(
        jax.make_jaxpr(step.train)(
            step.frozen, step.trainable, step.opt_state, next(make_batches())
        )
    )
    assert f"bf16[{config.padded_vocab_size},{config.hidden_size}]" in jaxpr
    assert f"f32[{config.padded_vocab_size},{config.hidden_size}]" not in jaxpr


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        (
            {"rank": 0},
            "lora.rank is 0, which trains the whole model, but other lora settings are given",
        ),
        ({"rank": 17}, r"lora.rank is 17, but v is a matrix of 16 x 32; choose 1 to 16"),
        ({"rank": -1}, "lora.rank is -1, but q is a matrix"),
        (
            {"targets": ["q", "qkv"]},
            (
                "the target qkv of lora.targets does not exist; there are q, k, v, o, gate, up,"
                " down, embed, head"
            ),
        ),
        ({"targets": []}, "lora.targets is empty"),
        ({"dropout": 1.0}, "lora.dropout is 1.0"),
        ({"train_also": ["head"]}, "ties to the embedding; name embed"),
        (
            {"train_also": ["<|laugh|>"]},
            r"lora.train_also has <\|laugh\|>, which is neither norms, embed, head nor a token",
        ),
        (
            {"train_also": ["embed"], "targets": ["head"]},
            "the target head of lora.targets is trained whole",
        ),
        (
            {"train_also": ["token1"], "targets": ["embed"]},
            "trains rows of the tables, and a table is trained or adapted as well",
        ),
    ],
)
def test_refusals(settings, complaint):
    config = config_of(hf_llama())
    with pytest.raises(UserError, match=complaint):
        adapter_config(
            LoraSettings(**({"rank": 4, "alpha": 2.0} | settings)), config, {"token1": 1}
        )
