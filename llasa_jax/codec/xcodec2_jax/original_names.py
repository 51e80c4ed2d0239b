"""The original `xcodec2` package's checkpoints (HKUSTAudio/xcodec2) under transformers' names."""

import re
from typing import Any

import numpy as np

from llasa_jax.codec.original import SEMANTIC_LAYERS

# transformers' modules and the package's. {i} is a layer's or block's number, {next} the one after.
_BLOCK = "generator.backbone.transformers.{i}"
MODULES = {
    "semantic_encoder": "semantic_model",
    "semantic_adapter.conv1": "SemanticEncoder_module.initial_conv",
    "semantic_adapter.conv2": "SemanticEncoder_module.residual_blocks.1",
    "semantic_adapter.conv3": "SemanticEncoder_module.residual_blocks.3",
    "semantic_adapter.conv4": "SemanticEncoder_module.final_conv",
    "acoustic_encoder.conv1": "CodecEnc.conv_blocks.0",
    "acoustic_encoder.block.{i}.res_unit1.snake1": "CodecEnc.conv_blocks.{next}.block.0.block.0",
    "acoustic_encoder.block.{i}.res_unit1.conv1": "CodecEnc.conv_blocks.{next}.block.0.block.1",
    "acoustic_encoder.block.{i}.res_unit1.snake2": "CodecEnc.conv_blocks.{next}.block.0.block.2",
    "acoustic_encoder.block.{i}.res_unit1.conv2": "CodecEnc.conv_blocks.{next}.block.0.block.3",
    "acoustic_encoder.block.{i}.res_unit2.snake1": "CodecEnc.conv_blocks.{next}.block.1.block.0",
    "acoustic_encoder.block.{i}.res_unit2.conv1": "CodecEnc.conv_blocks.{next}.block.1.block.1",
    "acoustic_encoder.block.{i}.res_unit2.snake2": "CodecEnc.conv_blocks.{next}.block.1.block.2",
    "acoustic_encoder.block.{i}.res_unit2.conv2": "CodecEnc.conv_blocks.{next}.block.1.block.3",
    "acoustic_encoder.block.{i}.res_unit3.snake1": "CodecEnc.conv_blocks.{next}.block.2.block.0",
    "acoustic_encoder.block.{i}.res_unit3.conv1": "CodecEnc.conv_blocks.{next}.block.2.block.1",
    "acoustic_encoder.block.{i}.res_unit3.snake2": "CodecEnc.conv_blocks.{next}.block.2.block.2",
    "acoustic_encoder.block.{i}.res_unit3.conv2": "CodecEnc.conv_blocks.{next}.block.2.block.3",
    "acoustic_encoder.block.{i}.snake1": "CodecEnc.conv_blocks.{next}.block.3",
    "acoustic_encoder.block.{i}.conv1": "CodecEnc.conv_blocks.{next}.block.4",
    "acoustic_encoder.snake1": "CodecEnc.conv_final_block.0",
    "acoustic_encoder.conv2": "CodecEnc.conv_final_block.1",
    "fc_encoder": "fc_prior",
    "quantizer": "generator.quantizer",
    "acoustic_decoder.fc": "fc_post_a",
    "acoustic_decoder.embed": "generator.backbone.embed",
    "acoustic_decoder.prior_net": "generator.backbone.prior_net",
    "acoustic_decoder.layers.{i}.input_layernorm": _BLOCK + ".att_norm",
    "acoustic_decoder.layers.{i}.self_attn.q_proj": _BLOCK + ".att.c_attn",
    "acoustic_decoder.layers.{i}.self_attn.k_proj": _BLOCK + ".att.c_attn",
    "acoustic_decoder.layers.{i}.self_attn.v_proj": _BLOCK + ".att.c_attn",
    "acoustic_decoder.layers.{i}.self_attn.o_proj": _BLOCK + ".att.c_proj",
    "acoustic_decoder.layers.{i}.post_attention_layernorm": _BLOCK + ".ffn_norm",
    "acoustic_decoder.layers.{i}.mlp": _BLOCK + ".mlp",
    "acoustic_decoder.post_net": "generator.backbone.post_net",
    "acoustic_decoder.norm": "generator.backbone.final_layer_norm",
    "acoustic_decoder.head.linear": "generator.head.out",
}  # fmt: skip
_NORM = ".parametrizations.weight.original"  # a convolution's weight is g v / |v|: 0 is g, 1 is v


def canonical_name(name: str) -> str | None:
    """A tensor's name in the package's own `state_dict`; None in layers that are not used.

    The hub's checkpoint has `beta` for the package's `bias`, and weight norm's older names.
    """
    layer = re.match(r"semantic_model\.encoder\.layers\.(\d+)\.", name)
    if layer and int(layer[1]) >= SEMANTIC_LAYERS:
        return None
    name = re.sub(r"\bact\.beta$", "act.bias", name)
    return re.sub(r"\.weight_([gv])$", lambda match: f"{_NORM}{'gv'.index(match[1])}", name)


def original_names(name: str, tensors) -> list[str]:
    """The tensors of a checkpoint, by canonical names, that make transformers' tensor `name`."""
    number = re.match(r"(?:acoustic_encoder\.block|acoustic_decoder\.layers)\.(\d+)\.", name)
    generic = name.replace(f".{number[1]}.", ".{i}.", 1) if number else name
    module = max((key for key in MODULES if generic.startswith(f"{key}.")), key=len)
    i = int(number[1]) if number else 0
    made = MODULES[module].format(i=i, next=i + 1) + generic.removeprefix(module)
    made = re.sub(r"\bact\.beta$", "act.bias", made)
    normed = made.removesuffix(".weight") + _NORM
    return [normed + "0", normed + "1"] if normed + "0" in tensors else [made]


def joined_shape(name: str, shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    """The shape of what `joined` makes."""
    rows, *rest = shapes[-1]
    return (rows // 3, *rest) if _third(name) is not None else (rows, *rest)


def joined(name: str, arrays: list[np.ndarray]) -> np.ndarray:
    """One tensor of transformers' from the package's: a normed weight, or a third of `c_attn`.

    The package turns other pairs of a head's values than transformers does, but as both turn a head
    by one angle at all times (see `decoder.py`), the order of a head's values makes no difference.
    """
    if len(arrays) == 2:
        norm, direction = arrays
        return direction * (norm / np.sqrt(np.square(direction).sum((1, 2), keepdims=True)))
    third = _third(name)
    return arrays[0] if third is None else np.split(arrays[0], 3)[third]


def _third(name: str) -> int | None:
    """Which third of `c_attn` a weight is."""
    match = re.search(r"acoustic_decoder\..*\.([qkv])_proj\.", name)
    return "qkv".index(match[1]) if match else None


def is_constant(name: str) -> bool:
    """Whether a tensor is a filter or window, which the package saves and transformers computes."""
    return name.endswith((".filter", ".window"))


def original_config(tensors):
    """The `Xcodec2Config` of a checkpoint: the published one, with sizes read from shapes.

    Raises KeyError for a missing tensor.
    """
    from transformers import Xcodec2Config

    def layers(prefix: str) -> int:
        found = [re.match(re.escape(prefix) + r"\.(\d+)\.", name) for name in tensors]
        return max((int(match[1]) + 1 for match in found if match), default=0)

    config = Xcodec2Config(
        hidden_size=tensors.shape("fc_post_a.weight")[0],
        intermediate_size=tensors.shape("generator.backbone.transformers.0.mlp.fc1.weight")[0],
        num_hidden_layers=layers("generator.backbone.transformers"),
        encoder_hidden_size=tensors.shape("CodecEnc.conv_blocks.0.bias")[0],
    )
    semantic: Any = config.semantic_model_config
    semantic.num_hidden_layers = layers("semantic_model.encoder.layers")
    semantic.intermediate_size = tensors.shape(
        "semantic_model.encoder.layers.0.ffn1.intermediate_dense.weight"
    )[0]
    if "semantic_model.masked_spec_embed" not in tensors:  # for training alone
        semantic.mask_time_prob = 0.0
    return config
