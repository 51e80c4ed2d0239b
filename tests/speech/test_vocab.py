"""The speech vocabulary: upstream's order after any text tokenizer; all else is refused."""

import numpy as np
import pytest

from llasa_jax.demo.tiny_llama import make_tiny_tokenizer
from llasa_jax.errors import UserError
from llasa_jax.speech.vocab import MARKERS, NUM_CODES, SpeechVocab, code_token, extend_tokenizer


def test_order_is_upstreams(tokenizer):
    plain = make_tiny_tokenizer(extend=False)
    vocab = SpeechVocab.of(tokenizer)
    assert tokenizer.convert_ids_to_tokens(range(len(plain), len(plain) + 9)) == [
        "<|TEXT_GENERATION_START|>",
        "<|TEXT_GENERATION_END|>",
        "<|TEXT_UNDERSTANDING_START|>",
        "<|TEXT_UNDERSTANDING_END|>",
        "<|SPEECH_GENERATION_START|>",
        "<|SPEECH_GENERATION_END|>",
        "<|SPEECH_UNDERSTANDING_START|>",
        "<|SPEECH_UNDERSTANDING_END|>",
        "<|s_0|>",
    ]
    assert vocab.code_base == len(plain) + 8
    assert vocab.size == len(tokenizer) == len(plain) + 65_544
    assert tokenizer.convert_tokens_to_ids("<|s_65535|>") == vocab.size - 1
    assert vocab.speech_start == tokenizer.convert_tokens_to_ids("<|SPEECH_GENERATION_START|>")


def test_added_tokens_survive_decoding(tokenizer):
    """Upstream's inference reads codes from text decoded with skip_special_tokens, so they must not
    be special.
    """
    vocab = SpeechVocab.of(tokenizer)
    assert (
        tokenizer.decode([vocab.speech_start, vocab.code_base + 7], skip_special_tokens=True)
        == "<|SPEECH_GENERATION_START|><|s_7|>"
    )


def test_codes_and_ids(tokenizer):
    vocab = SpeechVocab.of(tokenizer)
    codes = np.array([0, 1, 65_535], np.uint16)
    ids = vocab.ids_of(codes)
    assert ids.dtype == np.int32
    assert tokenizer.convert_ids_to_tokens(ids.tolist()) == ["<|s_0|>", "<|s_1|>", "<|s_65535|>"]
    np.testing.assert_array_equal(vocab.codes_of([3, *ids, vocab.speech_end]), codes)
    for wrong in ([-1], [65_536], ids + 1):
        with pytest.raises(ValueError, match="outside 0..65535"):
            vocab.ids_of(np.asarray(wrong))


def test_extending_twice_changes_nothing(tokenizer):
    before = len(tokenizer)
    extend_tokenizer(tokenizer)
    assert len(tokenizer) == before


def test_refusals():
    plain = make_tiny_tokenizer(extend=False)
    with pytest.raises(UserError, match="has no speech tokens"):
        SpeechVocab.of(plain)
    plain.add_tokens(
        [*MARKERS[:4], "<|surprise|>", *MARKERS[4:], *map(code_token, range(NUM_CODES))]
    )
    with pytest.raises(UserError, match=r"SPEECH_GENERATION_START\|> should have id"):
        SpeechVocab.of(plain)
    with pytest.raises(UserError, match="extended differently"):
        extend_tokenizer(plain)
    short = make_tiny_tokenizer(extend=False)
    short.add_tokens([*MARKERS, *map(code_token, range(100))])
    with pytest.raises(UserError, match=r"s_100\|> should have id \d+ but is missing"):
        SpeechVocab.of(short)
