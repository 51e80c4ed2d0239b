"""A Hugging Face checkpoint as GGUF, the file of llama.cpp (the extra `gguf`).

The names and keys are those of the package `gguf`. Three things are llama.cpp's own: in the rows of
q and k the two halves of each head are interleaved, as its rotary embedding turns neighbours;
Llama 3's scaling of frequencies is a tensor of divisors, `rope_freqs.weight`; vectors stay float32.
"""

import math
from pathlib import Path
from typing import Literal

import numpy as np

from llasa_jax.convert import hf_files
from llasa_jax.convert.model_folder import open_model
from llasa_jax.convert.names import check_names
from llasa_jax.convert.safetensors_io import SafetensorsFolder
from llasa_jax.errors import UserError
from llasa_jax.model.config import ModelConfig
from llasa_jax.model.llama import rope_frequencies
from llasa_jax.runtime.writing import new_file
from llasa_jax.speech.vocab import LLAMA_3_WORDS, SPEECH_GENERATION

TYPES = ("f32", "f16", "bf16", "q8_0")


def write_gguf(source: Path, out: Path, kind: Literal["f32", "f16", "bf16", "q8_0"]) -> None:
    """Writes the file `out` from the checkpoint in the folder `source`, as `export_hf` writes it,
    with matrices of the type `kind`, one tensor at a time. Where `q8_0` does not fit, because a row
    is no multiple of 32, the matrix is `f16`.

    UserError for what is no such checkpoint, for a tokenizer that is not Llama 3's, and for values
    that `f16` cannot hold.
    """
    try:
        import gguf
    except ImportError:
        raise UserError(
            'GGUF needs the package gguf; install it with `pip install "llasa-jax[gguf]"`'
        ) from None
    model = open_model(source)
    if not model.is_hf:
        raise UserError(f"{source} is no Hugging Face checkpoint; give what export-hf wrote")
    checkpoint, config = SafetensorsFolder(source), model.config
    check_names({name: t.shape for name, t in checkpoint.tensors.items()}, config, str(source))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    with new_file(out) as new:
        writer = gguf.GGUFWriter(new, "llama")
        _add_sizes(writer, config, source.name)
        _add_tokenizer(writer, source, config.vocab_size)
        most = "ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"
        writer.add_file_type(gguf.LlamaFileType[most])
        types = {}
        for name, tensor in checkpoint.tensors.items():
            type_ = kind if len(tensor.shape) > 1 else "f32"
            if type_ == "q8_0" and tensor.shape[-1] % 32:
                type_ = "f16"
            types[name] = gguf.GGMLQuantizationType[type_.upper()]
            shape = gguf.quants.quant_shape_to_byte_shape(tensor.shape, types[name])
            new_name = names.get_name(name, try_suffixes=(".weight",))
            assert new_name is not None  # as check_names has found a Llama's alone
            _announce(writer, new_name, shape, types[name])
        divisors = _rope_divisors(config)
        if divisors is not None:
            shape = (4 * len(divisors),)
            _announce(writer, "rope_freqs.weight", shape, gguf.GGMLQuantizationType.F32)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name in checkpoint.tensors:
            values = _llama_cpp_order(name, checkpoint.read(name).astype(np.float32), config)
            if types[name] == gguf.GGMLQuantizationType.F16 and np.abs(values).max() > 65_504:
                raise UserError(f"{source}: {name} has values beyond float16; choose f32 or bf16")
            writer.write_tensor_data(gguf.quants.quantize(values, types[name]))
        if divisors is not None:
            writer.write_tensor_data(divisors)
        writer.close()


def _announce(writer, name: str, byte_shape: tuple[int, ...], kind) -> None:
    """What the file's header says of a tensor, whose rows have so many bytes."""
    writer.add_tensor_info(name, byte_shape, np.dtype(np.uint8), math.prod(byte_shape), kind)


def _add_sizes(writer, config: ModelConfig, name: str) -> None:
    writer.add_name(name)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _add_tokenizer(writer, source: Path, size: int) -> None:
    """The vocabulary and the chat's template. Generation ends at the end of speech."""
    import gguf

    path = source / hf_files.TOKENIZER
    content = hf_files.read_json(path) if path.is_file() else {}
    before = content.get("pre_tokenizer") or {}
    patterns = [part.get("pattern", {}) for part in before.get("pretokenizers", [])]
    if {"Regex": LLAMA_3_WORDS} not in patterns or content.get("model", {}).get("type") != "BPE":
        raise UserError(
            f"{path}: not Llama 3's way to cut a text; llama.cpp would read texts otherwise"
        )
    tokens = hf_files.vocabulary(source)
    if SPEECH_GENERATION[1] not in tokens or max(tokens.values()) >= size:
        raise UserError(f"{source}: the tokenizer is not that of a Llasa of {size:,} tokens")
    special = {token["content"]: token["special"] for token in content["added_tokens"]}
    kinds = {True: gguf.TokenType.CONTROL, False: gguf.TokenType.USER_DEFINED}
    listed_tokens = [f"[PAD{i}]" for i in range(size)]
    types = [gguf.TokenType.UNUSED] * size
    for token, number in tokens.items():
        listed_tokens[number] = token
        types[number] = kinds[special[token]] if token in special else gguf.TokenType.NORMAL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")  # llama.cpp's name of Llama 3's way to cut a text
    writer.add_token_list(listed_tokens)
    writer.add_token_types(types)
    writer.add_eot_token_id(tokens[SPEECH_GENERATION[1]])
    gguf.SpecialVocab(source, load_merges=True, n_vocab=size).add_to_gguf(writer, quiet=True)


def _llama_cpp_order(name: str, values: np.ndarray, config: ModelConfig) -> np.ndarray:
    """A tensor with the rows of q and k in llama.cpp's order."""
    part = name.split(".")[-2]
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(part)
    if heads is None:
        return values
    halves = values.reshape(heads, 2, config.head_dim // 2, -1)
    return halves.swapaxes(1, 2).reshape(values.shape)


def _rope_divisors(config: ModelConfig) -> np.ndarray | None:
    """By what Llama 3's scaling divides each frequency, float32 (head_dim / 2,), or None."""
    if config.rope_scaling is None:
        return None
    plain, scaled = (
        rope_frequencies(config.head_dim, config.rope_theta, scaling)
        for scaling in (None, config.rope_scaling)
    )
    return plain / scaled
