"""The table between HF's tensor names and ours. Nothing is transposed: HF's matrices are only
reshaped, and layers stacked.

    HF                                     ours          HF's shape -> ours
model.embed_tokens.weight              embed         [vocab_size, D] -> [V, D], rows of zeros added
    model.layers.{l}.self_attn.q_proj      layers.q[l]   [N*H, D] -> [N, H, D]
    model.layers.{l}.self_attn.o_proj      layers.o[l]   [D, N*H] -> [D, N, H]
    ...

Letters as in `llasa_jax.model.axes`.
"""

import math
import re
from dataclasses import dataclass

from llasa_jax.errors import UserError, listed
from llasa_jax.model.axes import parameter_axes, sizes
from llasa_jax.model.config import ModelConfig

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TOP = {"embed": EMBED, "norm": "model.norm.weight", "head": HEAD}
LAYER = {
    "attn_norm": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
# What HF itself skips: old checkpoints carry this buffer, which is computed from the config.
IGNORED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


@dataclass(frozen=True)
class Place:
    """Where one HF tensor, of HF's `shape`, lies in our tree: in the parameter `path`, at `layer`
    where that is stacked.
    """

    path: str
    layer: int | None
    shape: tuple[int, ...]


def our_axes(config: ModelConfig) -> dict[str, str]:
    """The letters of each parameter's dimensions, by path: `layers.q`: "LNHD"."""
    tree = parameter_axes(config)
    return {name: axes for name, axes in tree.items() if name != "layers"} | {
        f"layers.{n}": axes for n, axes in tree["layers"].items()
    }


def our_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of each parameter, by path: `layers.q`: (L, N, H, D)."""
    return {
        path: tuple(sizes(config)[letter] for letter in axes)
        for path, axes in our_axes(config).items()
    }


def places(config: ModelConfig) -> dict[str, Place]:
    """Every tensor of the HF checkpoint, in the model's order, and where it lies with us."""
    table_shape = (config.vocab_size, config.hidden_size)
    axes = our_axes(config)
    layers = {
        f"model.layers.{layer}.{name}.weight": Place(
            f"layers.{path}", layer, _hf_shape(config, axes[f"layers.{path}"][1:])
        )
        for layer in range(config.num_hidden_layers)
        for path, name in LAYER.items()
    }
    found = (
        {EMBED: Place("embed", None, table_shape)}
        | layers
        | {TOP["norm"]: Place("norm", None, (config.hidden_size,))}
    )
    return found if config.tie_word_embeddings else found | {HEAD: Place("head", None, table_shape)}


def _hf_shape(config: ModelConfig, axes: str) -> tuple[int, ...]:
    """HF flattens heads and head width into one dimension."""
    return tuple(
        math.prod(sizes(config)[letter] for letter in group)
        for group in re.findall("[NK]H|.", axes)
    )


def check_names(
    found: dict[str, tuple[int, ...]], config: ModelConfig, where: str
) -> dict[str, Place]:
    """Maps every tensor of a checkpoint that is to be read to its place with us, in the order of
    `found` (shapes by name).

    Raises UserError that names all missing, unexpected and misshapen tensors together. Left out are
    HF's own buffers, and an `lm_head` beside a tied embedding (the caller compares them); where the
    embedding itself is absent, the head takes its place, as in HF.
    """
    expected = places(config)
    if config.tie_word_embeddings and EMBED not in found and HEAD in found:
        expected = {HEAD if name == EMBED else name: place for name, place in expected.items()}
    spare = {HEAD} if config.tie_word_embeddings else set()
    problems = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [
            name
            for name in found
            if name not in expected and name not in spare and not IGNORED.fullmatch(name)
        ],
        "misshapen": [
            f"{name} {list(found[name])} instead of {list(place.shape)}"
            for name, place in expected.items()
            if name in found and tuple(found[name]) != place.shape
        ],
    }
    if any(problems.values()):
        problem = "; ".join(f"{what} {listed(names)}" for what, names in problems.items() if names)
        raise UserError(
            f"{where} does not hold the tensors that its config.json promises ({problem}); download"
            " it again, or correct its config.json"
        )
    return {name: expected[name] for name in found if name in expected}
