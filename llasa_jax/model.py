"""LLaMA in Flax NNX: grouped-query attention, SwiGLU, RMSNorm, rotary positions, layers stacked and scanned.

One alphabet names every dimension, in tensor names, einsum strings and the sharding table:
B rows, T tokens, S cache slots, L layers, V vocabulary (padded), D model width, N query heads, K key-value heads,
H head width, F MLP width.

Weights keep HF's own [out, in] order, so a converter only reshapes and stacks and nothing is ever transposed.
Reference: transformers' `LlamaForCausalLM`.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from llasa_jax.attention import attend, cache_mask, xla_attention
from llasa_jax.config import ModelConfig, RopeScaling

LAYER_AXES = {
    "attn_norm": "D",
    "q": "NHD",
    "k": "KHD",
    "v": "KHD",
    "o": "DNH",
    "mlp_norm": "D",
    "gate": "FD",
    "up": "FD",
    "down": "DF",
}
TABLE_AXES = "VD"

Remat = Literal["none", "dots", "full", "offload"]
REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": None,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[], names_which_can_be_offloaded=["layer_input"], offload_src="device", offload_dst="pinned_host"
    ),
}


def sizes(config: ModelConfig) -> dict[str, int]:
    """What each letter of the alphabet stands for in this model."""
    return {
        "L": config.num_hidden_layers,
        "V": config.padded_vocab_size,
        "D": config.hidden_size,
        "N": config.num_attention_heads,
        "K": config.num_key_value_heads,
        "H": config.head_dim,
        "F": config.intermediate_size,
    }


def parameter_axes(config: ModelConfig) -> dict:
    """The parameter tree with each weight's dimensions, as letters, in place of the weight."""
    head = {} if config.tie_word_embeddings else {"head": TABLE_AXES}
    return {"embed": TABLE_AXES, "layers": {name: f"L{axes}" for name, axes in LAYER_AXES.items()}, "norm": "D"} | head


def _parameter(config: ModelConfig, axes: str, param_dtype, rngs: nnx.Rngs) -> nnx.Param:
    shape = tuple(sizes(config)[letter] for letter in axes)
    if axes == "D":
        return nnx.Param(jnp.ones(shape, param_dtype))
    return nnx.Param(jax.random.normal(rngs.params(), shape, param_dtype) * 0.02)


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """Angle a position of each pair of channels, float32 [H / 2], with Llama 3's scaling as in HF's `modeling_rope_utils`."""
    freq = (1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim))).astype(np.float32)
    if scaling is None:
        return freq
    wavelength = 2 * np.pi / freq
    longest = scaling.original_max_position_embeddings / scaling.low_freq_factor
    shortest = scaling.original_max_position_embeddings / scaling.high_freq_factor
    smooth = (scaling.original_max_position_embeddings / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    between = (1 - smooth) * freq / scaling.factor + smooth * freq
    return np.where(wavelength > longest, freq / scaling.factor, np.where(wavelength < shortest, freq, between)).astype(np.float32)


def apply_rope(x_BTNH: jax.Array, cos_BTH: jax.Array, sin_BTH: jax.Array) -> jax.Array:
    """HF's half rotation: channel i turns with channel i + H/2."""
    left, right = jnp.split(x_BTNH, 2, axis=-1)
    rotated = jnp.concatenate([-right, left], axis=-1)
    return x_BTNH * cos_BTH[:, :, None] + rotated * sin_BTH[:, :, None]


def rms_norm(x: jax.Array, weight_D: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square norm, computed in float32 and returned in x's dtype."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return weight_D.astype(x.dtype) * normed.astype(x.dtype)


class Layout:
    """Where arrays lie while the model runs. Here nothing moves; `sharding.MeshLayout` is the same over a mesh."""

    def weight(self, axes: str, weight: jax.Array) -> jax.Array:
        """A weight (its dimensions as letters) on its way into the arithmetic."""
        return weight

    def rows(self, x: jax.Array) -> jax.Array:
        """An activation [B, ...] between layers."""
        return x

    def look_up(self, table_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
        """The rows of a table, [B, T, D]."""
        return jnp.take(table_VD, tokens_BT, axis=0)


class Cache(nnx.Pytree):
    """Keys and values of every layer, [L, B, S, K, H] each; slot s holds position s."""

    def __init__(self, k: jax.Array, v: jax.Array):
        self.k = nnx.data(k)
        self.v = nnx.data(v)

    @classmethod
    def empty(cls, config: ModelConfig, rows: int, length: int, dtype) -> "Cache":
        s = sizes(config)
        shape = (s["L"], rows, length, s["K"], s["H"])
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


class Layer(nnx.Module):
    """One decoder layer. `Llama` holds all of them in one of these, each weight with a leading L."""

    def __init__(self, config: ModelConfig, param_dtype, rngs: nnx.Rngs):
        for name, axes in LAYER_AXES.items():
            setattr(self, name, _parameter(config, axes, param_dtype, rngs))


class Llama(nnx.Module):
    """`LlamaForCausalLM`. Weights are kept in `param_dtype`, the arithmetic is done in `dtype`.

    `remat` "full" recomputes each layer in the backward pass, so that only its input is kept; "dots" keeps the results of products with
    weights as well; "none" keeps everything; "offload" is "full" with those inputs in the host's memory. `attention` maps q [B, T, N, H],
    k and v [B, T, K, H] and segment ids [B, T] to [B, T, N, H].
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        dtype=jnp.bfloat16,
        param_dtype=jnp.float32,
        remat: Remat = "full",
        attention=xla_attention,
        layout: Layout | None = None,
    ):
        self.config, self.dtype, self.remat, self.attention, self.layout = config, dtype, remat, attention, layout or Layout()
        self.embed = _parameter(config, TABLE_AXES, param_dtype, rngs)
        make_layers = nnx.vmap(lambda r: Layer(config, param_dtype, r), in_axes=0, out_axes=0)
        self.layers = nnx.split_rngs(splits=config.num_hidden_layers)(make_layers)(rngs)
        self.norm = _parameter(config, "D", param_dtype, rngs)
        if not config.tie_word_embeddings:
            self.head = _parameter(config, TABLE_AXES, param_dtype, rngs)

    @property
    def output_table(self) -> jax.Array:
        """The head's weights [V, D]: the embedding itself where the config ties them."""
        return (self.embed if self.config.tie_word_embeddings else self.head)[...]

    def __call__(self, tokens_BT: jax.Array, positions_BT: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
        """Final hidden states [B, T, D] of packed rows. `logits` turns them into scores; the loss does so in chunks.

        `tokens`, `positions` and `segment_ids` are int32 [B, T]; positions restart in each segment, segment 0 is padding.
        """
        rope = self._rope(positions_BT)

        def layer_step(x, weights):
            x = checkpoint_name(x, "layer_input")
            return self._layer(x, weights, rope, lambda q, k, v: self.attention(q, k, v, segment_ids_BT)), None

        if self.remat != "none":
            layer_step = jax.checkpoint(layer_step, prevent_cse=False, policy=REMAT_POLICIES[self.remat])
        x_BTD, _ = jax.lax.scan(layer_step, self._embed(tokens_BT), self._layer_weights())
        return rms_norm(x_BTD, self.norm[...], self.config.rms_norm_eps)

    def decode(self, tokens_BT: jax.Array, positions_BT: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """Like a call, but over a cache that already holds every earlier position; returns it with these T added.

        Rows may be at different positions. A row that is padded at its right writes its padding into slots that its later tokens
        overwrite before anything sees them.
        """
        mask = cache_mask(positions_BT, cache.k.shape[2])
        rows = jnp.arange(tokens_BT.shape[0])[:, None]
        rope = self._rope(positions_BT)

        def layer_step(carry, layer):
            x, k_cache, v_cache = carry
            weights, index = layer
            stored = {}

            def attend_to_cache(q, k, v):
                stored["k"] = k_cache.at[index, rows, positions_BT].set(k)
                stored["v"] = v_cache.at[index, rows, positions_BT].set(v)
                return attend(q, stored["k"][index], stored["v"][index], mask)

            x = self._layer(x, weights, rope, attend_to_cache)
            return (x, stored["k"], stored["v"]), None

        start = (self._embed(tokens_BT), cache.k, cache.v)
        layers = (self._layer_weights(), jnp.arange(self.config.num_hidden_layers))
        (x_BTD, k, v), _ = jax.lax.scan(layer_step, start, layers)
        return rms_norm(x_BTD, self.norm[...], self.config.rms_norm_eps), Cache(k, v)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Float32 scores [..., vocab_size] of hidden states [..., D]. Builds them all: for evaluation and generation."""
        scores = jnp.einsum("...D,VD->...V", hidden, self.output_table.astype(self.dtype), preferred_element_type=jnp.float32)
        return scores[..., : self.config.vocab_size]

    def _embed(self, tokens_BT):
        return self.layout.rows(self.layout.look_up(self.embed[...], tokens_BT).astype(self.dtype))

    def _layer_weights(self):
        return {name: getattr(self.layers, name)[...] for name in LAYER_AXES}

    def _layer(self, x_BTD, weights, rope, attention):
        """One layer; `attention` maps this step's queries, keys and values to what is attended to."""
        eps = self.config.rms_norm_eps
        w = {name: self.layout.weight(LAYER_AXES[name], weight.astype(self.dtype)) for name, weight in weights.items()}

        h = rms_norm(x_BTD, w["attn_norm"], eps)
        q = apply_rope(jnp.einsum("BTD,NHD->BTNH", h, w["q"]), *rope)
        k = apply_rope(jnp.einsum("BTD,KHD->BTKH", h, w["k"]), *rope)
        v = jnp.einsum("BTD,KHD->BTKH", h, w["v"])
        x_BTD = self.layout.rows(x_BTD + jnp.einsum("BTNH,DNH->BTD", attention(q, k, v), w["o"]))

        h = rms_norm(x_BTD, w["mlp_norm"], eps)
        h = jax.nn.silu(jnp.einsum("BTD,FD->BTF", h, w["gate"])) * jnp.einsum("BTD,FD->BTF", h, w["up"])
        return self.layout.rows(x_BTD + jnp.einsum("BTF,DF->BTD", h, w["down"]))

    def _rope(self, positions_BT):
        freq = rope_frequencies(self.config.head_dim, self.config.rope_theta, self.config.rope_scaling)
        angles = positions_BT[..., None].astype(jnp.float32) * jnp.concatenate([freq, freq])
        return jnp.cos(angles).astype(self.dtype), jnp.sin(angles).astype(self.dtype)
