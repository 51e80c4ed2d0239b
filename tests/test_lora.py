"""LoRA against PEFT around HF's LLaMA: the same start, logits, twenty steps of AdamW, and what is trained."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from peft import LoraConfig, get_peft_model
from reference import config_of, hf_llama, params_of
from test_train_step import ACCUMULATION, LENGTH, OPTIMIZER, ROWS, STEPS, make_batches, train_in_torch

from llasa_jax.lora import adapter_config, join, new_adapters, split
from llasa_jax.model import INPUTS
from llasa_jax.optimizer import make_optimizer
from llasa_jax.settings import LoraSettings, ModelSettings
from llasa_jax.sharding import make_mesh
from llasa_jax.train_step import TrainStep

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
PEFT_FACTORS = {"a": ("lora_A.default.weight", "lora_embedding_A.default"), "b": ("lora_B.default.weight", "lora_embedding_B.default")}


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
        return next(x for key, x in state.items() if where in key and f"{MODULES[name]}.{PEFT_FACTORS[factor][name == 'embed']}" in key)

    tree = {}
    for name in adapters.targets:
        tree[name] = {}
        for factor in "ab":
            shape = abstract["lora"][name][factor].shape
            layers = range(shape[0]) if name in INPUTS and name not in ("embed", "head") else (None,)
            stacked = np.stack([found(name, factor, layer) for layer in layers])
            tree[name][factor] = np.pad(stacked.reshape(-1), (0, int(np.prod(shape)) - stacked.size)).reshape(shape)
            if name == "embed" and factor == "a":
                tree[name][factor] = np.pad(stacked[0], ((0, 0), (0, shape[1] - stacked.shape[2])))
    return tree


def step_for(hf, settings, mesh, **options):
    config = config_of(hf)
    adapters = adapter_config(settings, config, {f"token{i}": i for i in range(300)})
    return TrainStep(
        config,
        ModelSettings(dtype="float32", loss_chunk=16),
        make_optimizer(OPTIMIZER, STEPS),
        mesh,
        adapters=adapters,
        frozen_dtype="float32",
        **options,
    )


def start_of(step, base, lora=None):
    """Frozen and trainable parameters, with adapters `lora` where given, on the step's mesh."""
    frozen, trainable = split(base, step.adapters)
    trainable = trainable | new_adapters(base, step.trainable, step.adapters, 0) | ({"lora": lora} if lora else {})
    places = jax.tree.map(lambda leaf: leaf.sharding, (step.frozen, step.trainable))
    return jax.device_put((frozen, trainable), places)


def one_device():
    return make_mesh(1, 1, 1, devices=jax.devices()[:1])


def randomised(peft_model, seed=0):
    """PEFT's model with factors that are all at work."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, weight in peft_model.named_parameters():
            if weight.requires_grad and "lora_" in name:
                weight.add_(0.1 * torch.randn_like(weight))
    return peft_model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rslora", [True, False])
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
    assert ACCUMULATION
    assert ROWS


@pytest.mark.parametrize("targets", [["q", "v"], list(INPUTS)])
def test_twenty_steps_equal_peft(targets):
    settings = LoraSettings(rank=4, alpha=8.0, dropout=0.0, targets=targets)
    hf = hf_llama(tied=False)
    base = params_of(hf)
    step = step_for(hf, settings, one_device())
    theirs = peft_llama(hf, settings)
    frozen, trainable = start_of(step, base, factors_of(theirs, step.adapters, step.trainable))
    opt_state = step.init(trainable)
    ours = []
    for batch in make_batches():
        trainable, opt_state, numbers = step.train(frozen, trainable, opt_state, jax.device_put(batch, step.batch_sharding))
        ours.append(float(numbers["loss"]))
    expected = train_in_torch(theirs)
    np.testing.assert_allclose(ours, [m["loss"] for m in expected], atol=1e-4)
    assert ours[-1] < ours[0] - 0.02
