"""HF's `config.json` of a Llama, read to the last field: each is honoured, known to mean nothing
here, or refused by name.

Both spellings are read: that of transformers 4 (`rope_theta`, `rope_scaling`, `torch_dtype`) and
that of 5 (`rope_parameters`, `dtype`). Absent fields have the defaults of HF's `LlamaConfig`.
"""

import math
from pathlib import Path
from typing import Any

from llasa_jax.errors import UserError
from llasa_jax.model.config import ModelConfig, RopeScaling

DEFAULTS = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
}
ROPE_THETA, RMS_NORM_EPS = 10_000.0, 1e-6
# Beyond any model: larger numbers are damage, and would take hours and all memory to refuse later.
MOST_LAYERS, MOST = 4096, 1 << 24
HONOURED = {
    *DEFAULTS,
    *(
        "architectures",
        "model_type",
        "num_key_value_heads",
        "head_dim",
        "rms_norm_eps",
        "tie_word_embeddings",
    ),
    *(
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "original_max_position_embeddings",
        "partial_rotary_factor",
    ),
    *("dtype", "torch_dtype"),
}
# What the model here does not do, each with the values that ask for nothing.
ONLY: dict[str, tuple] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "attention_dropout": (0, None),
    "quantization_config": (None,),
    "compression_config": (None,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "pruned_heads": ({}, None),
    "chunk_size_feed_forward": (0,),
    "sliding_window": (None,),
}
# Of no effect on the logits: what generation uses, how weights were once drawn, the bookkeeping of
# transformers and of others that write its files.
HARMLESS = {
    *(
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "initializer_range",
        "use_cache",
        "pretraining_tp",
        "problem_type",
    ),
    *(
        "transformers_version",
        "_name_or_path",
        "_model_name_or_path",  # of checkpoints that were GGUF files
        "llasa_prompt",  # our own; see hf_files
        "id2label",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "tokenizer_class",
        "finetuning_task",
        "task_specific_params",
        "is_decoder",
        "torchscript",
        "use_bfloat16",
        "tf_legacy_loss",
        "unsloth_fixed",
        "unsloth_version",
        "attn_implementation",
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_attn_implementation_internal",
    ),
    *("max_length", "min_length", "do_sample", "num_beams", "temperature", "top_k", "top_p"),
    *("typical_p", "repetition_penalty", "length_penalty", "num_return_sequences"),
    *("num_beam_groups", "sep_token_id", "decoder_start_token_id", "diversity_penalty"),
}


def model_config(config: dict, where: Path) -> ModelConfig:
    """The geometry that HF's config describes. UserError names `where`, the field, and why it is
    refused.
    """

    def refuse(field: str, why: str, value=None):
        raise UserError(f"{where}: {field} is {repr(config.get(field, value))[:200]}, {why}")

    if config.get("model_type") != "llama":
        refuse("model_type", "but only 'llama' is read; use a Llama or Llasa checkpoint")
    if config.get("architectures") not in (None, [], ["LlamaForCausalLM"]):
        refuse(
            "architectures",
            "but only LlamaForCausalLM is read; use the causal language model's checkpoint",
        )
    for field, harmless in ONLY.items():
        if field in config and config[field] not in harmless:
            if field in ("quantization_config", "compression_config"):
                raise UserError(
                    f"{where}: {field} says that the weights are quantised; use the checkpoint in"
                    " bfloat16 or float32"
                )
            refuse(field, f"which this model cannot do; only {harmless[0]!r} is read")

    known = HONOURED | HARMLESS | ONLY.keys()
    for field, value in config.items():
        if field not in known and value not in (None, False, [], {}):
            raise UserError(
                f"{where}: {field[:100]} is {repr(value)[:100]}, which is not known here and may"
                " change what the model computes; remove it from the file if it does not"
            )

    sizes = {field: config.get(field, default) for field, default in DEFAULTS.items()}
    heads = sizes["num_attention_heads"]
    sizes["num_key_value_heads"] = (
        heads if config.get("num_key_value_heads") is None else config["num_key_value_heads"]
    )
    for field, size in sizes.items():
        if type(size) is not int or size < 1:
            refuse(field, "but must be a whole number above zero; correct it")
        if size > (MOST_LAYERS if field == "num_hidden_layers" else MOST):
            refuse(field, "which is more than any model has; download the file again")
    sizes["head_dim"] = (
        sizes["hidden_size"] // heads if config.get("head_dim") is None else config["head_dim"]
    )
    width = sizes["head_dim"]
    if type(width) is not int or not 2 <= width <= MOST or width % 2:
        refuse(
            "head_dim",
            "but must be an even number, because rotary embeddings turn pairs of channels; correct"
            " it",
            width,
        )
    if heads % sizes["num_key_value_heads"]:
        refuse(
            "num_key_value_heads",
            f"which does not divide num_attention_heads, {heads}; correct one of them",
        )
    eps = config.get("rms_norm_eps", RMS_NORM_EPS)
    if not isinstance(eps, int | float) or not 0 <= eps < 1:
        refuse("rms_norm_eps", "but must be a small number; correct it")
    theta, scaling = _rope(config, where, sizes["max_position_embeddings"])
    tie = config.get("tie_word_embeddings", False)
    if not isinstance(tie, bool):
        refuse("tie_word_embeddings", "but must be true or false; correct it")
    return ModelConfig(
        **sizes,
        rope_theta=theta,
        rope_scaling=scaling,
        rms_norm_eps=float(eps),
        tie_word_embeddings=tie,
    )


def _rope(config: dict, where: Path, positions: int) -> tuple[float, RopeScaling | None]:
    """As transformers 5 reads it (`RotaryEmbeddingConfigMixin`): `rope_scaling` goes before
    `rope_parameters`.
    """
    field = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope = config.get(field) or {}
    if not isinstance(rope, dict):
        raise UserError(
            f"{where}: {field} is {rope!r}, but must be an object; take the model's original"
            " config.json"
        )
    kind = rope.get("rope_type") or rope.get("type") or "default"
    theta = rope.get("rope_theta", config.get("rope_theta", ROPE_THETA))
    if not isinstance(theta, int | float) or not 0 < theta < math.inf:
        raise UserError(
            f"{where}: rope_theta is {theta!r}, but must be a number above zero; correct it"
        )
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor")) not in (None, 1):
        raise UserError(
            f"{where}: partial_rotary_factor is set, and this model rotates whole heads only; use"
            " another checkpoint"
        )
    if kind == "default":
        return float(theta), None
    if kind != "llama3":
        raise UserError(
            f"{where}: the {field} of type {kind!r} is not read, only 'default' and 'llama3' are;"
            " use another checkpoint"
        )
    original: Any = config.get(
        "original_max_position_embeddings", rope.get("original_max_position_embeddings", positions)
    )
    try:
        low, high, factor = (
            float(rope[name]) for name in ("low_freq_factor", "high_freq_factor", "factor")
        )
        scaling = RopeScaling(factor, low, high, int(original))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{where}: {field} of type 'llama3' is incomplete ({error}); take the model's original"
            " config.json"
        ) from None
    if not (
        low < high < math.inf
        and 1 <= factor < math.inf
        and scaling.original_max_position_embeddings > 0
    ):
        raise UserError(
            f"{where}: {field} needs high_freq_factor above low_freq_factor and a factor of at"
            " least 1; correct it"
        )
    return float(theta), scaling


def dtype_key(config: dict) -> str:
    """Which of HF's two spellings of the weights' type a config uses; transformers reads both."""
    return "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
