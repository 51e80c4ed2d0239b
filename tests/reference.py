"""HF's LLaMA beside ours, with the same weights: mapped here by hand, independently of the converters under test."""

import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from transformers import LlamaConfig, LlamaForCausalLM

from llasa_jax.config import ModelConfig, RopeScaling
from llasa_jax.model import Llama

LLAMA3_SCALING = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


def hf_llama(seed=0, *, tied=True, kv_heads=2, scaled=True, vocab=300, layers=2, **sizes) -> LlamaForCausalLM:
    """A random float32 model. Its weights are larger than HF's own start, so that attention is far from uniform."""
    rope = {"rope_theta": 10_000.0, "rope_type": "llama3", **LLAMA3_SCALING} if scaled else {"rope_theta": 10_000.0, "rope_type": "default"}
    torch.manual_seed(seed)
    config = LlamaConfig(
        **{
            "vocab_size": vocab,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": kv_heads,
            "head_dim": 8,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": tied,
            "rope_parameters": rope,
            "initializer_range": 0.2,
            **sizes,
        }
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.add_(0.3 * torch.randn_like(weight))
    return model


def config_of(model: LlamaForCausalLM) -> ModelConfig:
    hf = model.config
    rope = hf.rope_parameters
    scaling = RopeScaling(**{k: rope[k] for k in LLAMA3_SCALING}) if rope["rope_type"] == "llama3" else None
    names = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
    )
    return ModelConfig(
        **{name: getattr(hf, name) for name in names},
        rope_theta=rope["rope_theta"],
        rope_scaling=scaling,
        rms_norm_eps=hf.rms_norm_eps,
        tie_word_embeddings=hf.tie_word_embeddings,
    )


def our_tree(tensor_of, config: ModelConfig) -> dict:
    """Our parameter tree from `tensor_of(HF name) -> array`, be they weights or gradients."""
    N, K, H, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.hidden_size
    places = {
        "attn_norm": ("input_layernorm", (D,)),
        "q": ("self_attn.q_proj", (N, H, D)),
        "k": ("self_attn.k_proj", (K, H, D)),
        "v": ("self_attn.v_proj", (K, H, D)),
        "o": ("self_attn.o_proj", (D, N, H)),
        "mlp_norm": ("post_attention_layernorm", (D,)),
        "gate": ("mlp.gate_proj", (-1, D)),
        "up": ("mlp.up_proj", (-1, D)),
        "down": ("mlp.down_proj", (D, -1)),
    }

    def stacked(name, shape):
        return np.stack([tensor_of(f"model.layers.{i}.{name}.weight").reshape(shape) for i in range(config.num_hidden_layers)])

    def table(name):
        return np.pad(tensor_of(f"{name}.weight"), ((0, config.padded_vocab_size - config.vocab_size), (0, 0)))

    head = {} if config.tie_word_embeddings else {"head": table("lm_head")}
    layers = {ours: stacked(*theirs) for ours, theirs in places.items()}
    return {"embed": table("model.embed_tokens"), "layers": layers, "norm": tensor_of("model.norm.weight")} | head


def params_of(model: LlamaForCausalLM) -> dict:
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    return our_tree(state.__getitem__, config_of(model))


def grads_of(model: LlamaForCausalLM) -> dict:
    grads = {name: weight.grad.numpy() for name, weight in model.named_parameters()}
    return our_tree(grads.__getitem__, config_of(model))


def our_llama(config: ModelConfig, params: dict, dtype=jnp.float32, **options) -> Llama:
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0), dtype=dtype, **options)))
    return nnx.merge(graphdef, params)
