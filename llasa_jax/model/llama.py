"""LLaMA in Flax NNX: grouped-query attention, SwiGLU, RMSNorm, rotary positions, layers stacked and
scanned.

`model/axes.py` has the letters that name every dimension, in tensor names, einsum strings and the
sharding table. Weights keep HF's own [out, in] order, so a converter only reshapes and stacks and
nothing is ever transposed. Reference: transformers' `LlamaForCausalLM`.

A layer's products are composed from those letters. They are:

    weight  product           with an adapter: its input   and its output
    q       BTD,NHD->BTNH     BTD,RD->BTR                  BTR,NHR->BTNH
    k, v    BTD,KHD->BTKH     BTD,RD->BTR                  BTR,KHR->BTKH
    o       BTNH,DNH->BTD     BTNH,RNH->BTR                BTR,DR->BTD
    gate,up BTD,FD->BTF       BTD,RD->BTR                  BTR,FR->BTF
    down    BTF,DF->BTD       BTF,RF->BTR                  BTR,DR->BTD
"""

from dataclasses import replace
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from llasa_jax.model.attention import attend, cache_mask, xla_attention
from llasa_jax.model.axes import INPUTS, LAYER_AXES, TABLE_AXES, adapter_axes, outputs, sizes
from llasa_jax.model.config import AdapterConfig, ModelConfig, RopeScaling
from llasa_jax.model.quantize import Quantized
from llasa_jax.model.sharding import Layout

Remat = Literal["none", "dots", "full", "offload"]
REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": None,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["layer_input"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


def _parameter(config: ModelConfig, axes: str, param_dtype, rngs: nnx.Rngs) -> nnx.Param:
    shape = tuple(sizes(config)[letter] for letter in axes)
    if axes == "D":
        return nnx.Param(jnp.ones(shape, param_dtype))
    return nnx.Param(jax.random.normal(rngs.params(), shape, param_dtype) * 0.02)


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """Angle a position of each pair of channels, float32 [H / 2], with Llama 3's scaling as in HF's
    `modeling_rope_utils`.
    """
    freq = (
        1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim))
    ).astype(np.float32)
    if scaling is None:
        return freq
    wavelength = 2 * np.pi / freq
    longest = scaling.original_max_position_embeddings / scaling.low_freq_factor
    shortest = scaling.original_max_position_embeddings / scaling.high_freq_factor
    smooth = (scaling.original_max_position_embeddings / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    between = (1 - smooth) * freq / scaling.factor + smooth * freq
    return np.where(
        wavelength > longest, freq / scaling.factor, np.where(wavelength < shortest, freq, between)
    ).astype(np.float32)


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
    """One decoder layer. `Llama` stacks all layers in one of these: weights have a leading L."""

    def __init__(self, config: ModelConfig, param_dtype, rngs: nnx.Rngs):
        for name, axes in LAYER_AXES.items():
            setattr(self, name, _parameter(config, axes, param_dtype, rngs))


class Llama(nnx.Module):
    """`LlamaForCausalLM`. Weights are kept in `param_dtype`, the arithmetic is done in `dtype`.

    `remat` "full" recomputes each layer in the backward pass, so that only its input is kept;
    "dots" keeps the results of products with weights as well; "none" keeps everything; "offload" is
    "full" with those inputs in the host's memory. `attention` maps q [B, T, N, H], k and v [B, T,
    K, H] and segment ids [B, T] to [B, T, N, H]. With `adapters` it is PEFT's `LoraModel` around
    that: no adapter is ever multiplied out.
    """

    # The factors of adapters, their rows, and which of them each row of a batch has. They exist
    # only in a model with such adapters.
    lora: dict[str, dict[str, nnx.Param]]
    rows: dict[str, nnx.Param]
    choice: dict[str, nnx.Param]

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
        adapters: AdapterConfig | None = None,
    ):
        self.config, self.dtype, self.remat, self.attention, self.layout = (
            config,
            dtype,
            remat,
            attention,
            layout or Layout(),
        )
        self.embed = _parameter(config, TABLE_AXES, param_dtype, rngs)
        make_layers = nnx.vmap(lambda r: Layer(config, param_dtype, r), in_axes=0, out_axes=0)
        self.layers = nnx.split_rngs(splits=config.num_hidden_layers)(make_layers)(rngs)
        self.norm = _parameter(config, "D", param_dtype, rngs)
        if not config.tie_word_embeddings:
            self.head = _parameter(config, TABLE_AXES, param_dtype, rngs)
        self.adapters = adapters
        size = sizes(config, adapters)
        for name, axes in adapter_axes(adapters, self._tables).items() if adapters else ():
            zeros = jax.tree.map(
                lambda letters: nnx.Param(
                    jnp.zeros([size[letter] for letter in letters], param_dtype)
                ),
                axes,
            )
            setattr(self, name, nnx.data(zeros))

    @property
    def _tables(self) -> tuple[str, ...]:
        return ("embed",) if self.config.tie_word_embeddings else ("embed", "head")

    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        segment_ids_BT: jax.Array,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """Final hidden states [B, T, D] of packed rows. `logits` turns them into scores; the loss
        does so in chunks.

        `tokens`, `positions` and `segment_ids` are int32 [B, T]; positions restart in each segment,
        segment 0 is padding. Without a `dropout_key` adapters drop nothing.
        """
        rope = self._rope(positions_BT)
        keys = (
            None
            if dropout_key is None
            else jax.random.split(dropout_key, self.config.num_hidden_layers)
        )

        def layer_step(x, layer):
            weights, key = layer
            x = checkpoint_name(x, "layer_input")
            return (
                self._layer(
                    x, weights, rope, lambda q, k, v: self.attention(q, k, v, segment_ids_BT), key
                ),
                None,
            )

        if self.remat != "none":
            # A scan runs its steps one after the other, so XLA cannot merge recomputation away: the
            # barriers of prevent_cse would only cost.
            layer_step = jax.checkpoint(
                layer_step, prevent_cse=False, policy=REMAT_POLICIES[self.remat]
            )
        x_BTD, _ = jax.lax.scan(layer_step, self._embed(tokens_BT), (self._layer_weights(), keys))
        return rms_norm(x_BTD, self.norm.get_value(), self.config.rms_norm_eps)

    def decode(
        self, tokens_BT: jax.Array, positions_BT: jax.Array, cache: Cache
    ) -> tuple[jax.Array, Cache]:
        """Like a call, but over a cache that already holds every earlier position; returns it with
        these T added.

        Rows may be at different positions. A row that is padded at its right writes its padding
        into slots that its later tokens overwrite before anything sees them.
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
        return rms_norm(x_BTD, self.norm.get_value(), self.config.rms_norm_eps), Cache(k, v)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Float32 scores [..., vocab_size] of hidden states [..., D]. Builds them all: for
        evaluation and generation.
        """
        parts = zip(*self.output_factors(hidden), strict=True)
        scores = sum(
            jnp.einsum(
                "...D,VD->...V", x, table.astype(self.dtype), preferred_element_type=jnp.float32
            )
            for x, table in parts
        )
        assert isinstance(scores, jax.Array)  # there is at least the head's part
        return scores[..., : self.config.vocab_size]

    def output_factors(
        self, hidden: jax.Array, dropout_key: jax.Array | None = None
    ) -> tuple[tuple[jax.Array, ...], ...]:
        """Features [..., F] and as many tables [V, F], whose products summed are the scores of
        hidden states [..., D].

        The first are `hidden` and the head's weights, which are the embedding's where the config
        ties them; the others are adapters'.
        """
        features, tables = [hidden], [self._table(self._tables[-1])]
        if "head" in self._lora:
            axes, factors = "RD", self.lora["head"]
            a_RD = self._weight(axes, factors["a"].get_value())
            features.append(
                self._scaled(
                    jnp.einsum("...D,RD->...R", self._drop(hidden, dropout_key, "head"), a_RD)
                )
            )
            tables.append(factors["b"].get_value())
        if self._rows:
            features.append(
                self._chosen(
                    jnp.einsum("...D,XD->...X", hidden, self._row_changes(self._tables[-1])), "rows"
                )
            )
            # What a token row adds to its class alone, as one more product of features and a table:
            # so the loss needs no case for it.
            tables.append(
                jax.nn.one_hot(
                    jnp.array(self._rows), self.config.padded_vocab_size, axis=0, dtype=self.dtype
                )
            )
        return tuple(features), tuple(tables)

    @property
    def _lora(self) -> tuple[str, ...]:
        return self.adapters.targets if self.adapters else ()

    @property
    def _rows(self) -> tuple[int, ...]:
        return self.adapters.token_ids if self.adapters else ()

    def _table(self, name):
        return getattr(self, name).get_value()

    def _weight(self, axes, weight):
        if isinstance(weight, Quantized):
            # Codes go over the mesh, not what they stand for.
            return replace(weight, q=self.layout.weight(axes, weight.q)).dense(self.dtype)
        return self.layout.weight(axes, weight.astype(self.dtype))

    def _embed(self, tokens_BT):
        x_BTD = self.layout.look_up(self._table("embed"), tokens_BT).astype(self.dtype)
        if "embed" in self._lora:
            a_RV, b_DR = (
                self.lora["embed"][factor].get_value().astype(self.dtype) for factor in "ab"
            )
            r_BTR = self._scaled(jnp.moveaxis(jnp.take(a_RV, tokens_BT, axis=1), 0, -1))
            x_BTD += jnp.einsum("BTR,DR->BTD", r_BTR, self.layout.weight("DR", b_DR))
        if self._rows:
            is_row_BTX = (tokens_BT[..., None] == jnp.array(self._rows)).astype(self.dtype)
            x_BTD += jnp.einsum(
                "BTX,XD->BTD", self._chosen(is_row_BTX, "rows"), self._row_changes("embed")
            )
        return self.layout.rows(x_BTD)

    def _row_changes(self, table):
        """What rows that are trained by themselves add to a table's own, [X, D]: they take their
        place, as PEFT's trainable tokens do.
        """
        # The frozen row is taken off with no gradient: only the trained one learns.
        own = jax.lax.stop_gradient(jnp.take(self._table(table), jnp.array(self._rows), axis=0))
        return self._weight("XD", self.rows[table].get_value() - own)

    def _layer_weights(self):
        """Each layer's weights, and the factors of the adapters that some of them have."""
        adapters = {
            name: [self.lora[name][factor].get_value() for factor in "ab"]
            for name in self._lora
            if name in LAYER_AXES
        }
        return {name: getattr(self.layers, name).get_value() for name in LAYER_AXES}, adapters

    def _layer(self, x_BTD, layer, rope, attention, dropout_key=None):
        """One layer; `attention` maps this step's queries, keys and values to its output."""
        eps = self.config.rms_norm_eps
        weights, adapters = layer
        w = {name: self._weight(LAYER_AXES[name], weight) for name, weight in weights.items()}

        def product(name, x):
            inner, outer = INPUTS[name], outputs(name)
            y = jnp.einsum(f"BT{inner},{LAYER_AXES[name]}->BT{outer}", x, w[name])
            if name not in adapters:
                return y
            a, b = (
                self._weight(axes, factor)
                for axes, factor in zip((f"R{inner}", f"{outer}R"), adapters[name], strict=True)
            )
            r_BTR = self._scaled(
                jnp.einsum(f"BT{inner},R{inner}->BTR", self._drop(x, dropout_key, name), a)
            )
            return y + jnp.einsum(f"BTR,{outer}R->BT{outer}", r_BTR, b)

        h = rms_norm(x_BTD, w["attn_norm"], eps)
        q, k, v = (
            apply_rope(product("q", h), *rope),
            apply_rope(product("k", h), *rope),
            product("v", h),
        )
        x_BTD = self.layout.rows(x_BTD + product("o", attention(q, k, v)))

        h = rms_norm(x_BTD, w["mlp_norm"], eps)
        h = jax.nn.silu(product("gate", h)) * product("up", h)
        return self.layout.rows(x_BTD + product("down", h))

    def _drop(self, x, key, target):
        """Dropout before an adapter, each target's its own, as PEFT has it."""
        if key is None:
            return x
        assert self.adapters
        if not self.adapters.dropout:
            return x
        keep = 1 - self.adapters.dropout
        kept = jax.random.bernoulli(
            jax.random.fold_in(key, list(INPUTS).index(target)), keep, x.shape
        )
        return jnp.where(kept, x / keep, 0).astype(x.dtype)

    def _scaled(self, r):
        assert self.adapters
        return self._chosen(r * jnp.asarray(self.adapters.scale, r.dtype), "lora")

    def _chosen(self, x, kind):
        """`x` [B, ..., R or X] with what each row of the batch makes of it, where several adapters
        lie side by side.
        """
        assert self.adapters
        if not self.adapters.batch:
            return x
        choice = self.choice[kind].get_value().astype(x.dtype)
        return x * choice.reshape(len(choice), *(1,) * (x.ndim - 2), -1)

    def _rope(self, positions_BT):
        freq = rope_frequencies(
            self.config.head_dim, self.config.rope_theta, self.config.rope_scaling
        )
        angles = positions_BT[..., None].astype(jnp.float32) * jnp.concatenate([freq, freq])
        return jnp.cos(angles).astype(self.dtype), jnp.sin(angles).astype(self.dtype)
