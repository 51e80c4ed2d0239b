"""A tiny seeded Llama checkpoint of the real HF classes, with a Llama-3-shaped tokenizer, for the
demo and the tests.
"""

from collections.abc import Iterable
from pathlib import Path

from llasa_jax.speech.vocab import LLAMA_3_WORDS, extend_tokenizer

SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|finetune_right_pad_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
)
# Writes what Llama 3.2's own template writes for plain conversations: a dated system turn always,
# contents trimmed.
CHAT_TEMPLATE = r"""
{%- set today = strftime_now("%d %b %Y") if strftime_now is defined else "26 Jul 2024" -%}
{%- set date = date_string if date_string is defined else today -%}
{%- set has_system = messages[0]["role"] == "system" -%}
{{- bos_token + "<|start_header_id|>system<|end_header_id|>\n\n" -}}
{{- "Cutting Knowledge Date: December 2023\nToday Date: " + date + "\n\n" -}}
{{- (messages[0]["content"] | trim if has_system else "") + "<|eot_id|>" -}}
{%- for message in (messages[1:] if has_system else messages) -%}
{{- "<|start_header_id|>" + message["role"] + "<|end_header_id|>\n\n" -}}
{{- message["content"] | trim + "<|eot_id|>" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- "<|start_header_id|>assistant<|end_header_id|>\n\n" -}}
{%- endif -%}
"""
SAMPLE_TEXT = (
    (
        "Convert the text to speech: the quick brown fox jumps over the lazy dog, and nothing else"
        " that she said was ever true."
    ),
    (
        "system user assistant Cutting Knowledge Date: December 2023 Today Date: 26 Jul 2024"
        " Speaker Transcribe the following speech"
    ),
)


def make_tiny_tokenizer(texts: Iterable[str] = SAMPLE_TEXT, extend: bool = True):
    """A byte-level BPE tokenizer with Llama 3's special tokens and chat format, learned from
    `texts`; Llasa's with `extend`.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA_3_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    # Every word of so small a text becomes a token, as common words are in a real vocabulary.
    trainer = trainers.BpeTrainer(
        vocab_size=2048, min_frequency=1, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.add_special_tokens(list(SPECIAL_TOKENS))
    bos = SPECIAL_TOKENS[0]
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, bpe.token_to_id(bos))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=bos, eos_token="<|eot_id|>", model_max_length=131_072
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    if extend:
        extend_tokenizer(tokenizer)
    return tokenizer


def make_tiny_llama(
    folder: str | Path,
    tokenizer,
    *,
    seed: int = 0,
    max_shard_size: str = "5GB",
    dtype: str = "float32",
    **sizes,
) -> None:
    """Saves a seeded random `LlamaForCausalLM` with `tokenizer` as an HF checkpoint. `sizes`
    override `LlamaConfig` fields.
    """
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    defaults = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "max_position_embeddings": 131_072,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": [
            tokenizer.convert_tokens_to_ids(t)
            for t in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
        ],
    }
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**defaults, **sizes})).to(getattr(torch, dtype))
    model.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
        do_sample=True,
        temperature=0.6,
        top_p=0.9,
    )
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(folder)
