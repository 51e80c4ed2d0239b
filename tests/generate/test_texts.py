"""Texts before they are spoken, and sound after it."""

import sys
import types

import numpy as np
import pyloudnorm
import pytest

from llasa_jax.errors import UserError
from llasa_jax.generate import sound, texts
from llasa_jax.generate.decode import reading_seconds
from llasa_jax.generate.texts import cut, normalize

STORY = (
    'Mr. Smith went home at 3.5 km an hour, i.e. slowly. "Was it far?" Nobody knew! He said so'
    " himself: it was far, and it was late, and it was cold, and it was dark. So he slept."
)


def test_texts_are_cut_between_sentences():
    pieces = cut(STORY, 6)
    assert " ".join(pieces) == STORY
    assert pieces[0].endswith('slowly. "Was it far?"')
    assert all(reading_seconds(piece) <= 6 for piece in pieces)
    # As few pieces as fit: no two neighbours would fit into one.
    for one, two in zip(pieces, pieces[1:], strict=False):
        assert reading_seconds(f"{one} {two}") > 6
    assert cut(STORY, 20) == [STORY]


def test_sentences_that_are_too_long_are_cut_at_clauses_and_words():
    pieces = cut(STORY, 2)
    assert " ".join(pieces) == STORY
    assert "So he slept." in pieces
    assert any(piece.endswith("cold,") for piece in pieces)
    assert all(reading_seconds(piece) <= 2 for piece in pieces)
    word = "x" * 100
    assert cut(f"a {word} b", 1) == ["a", word, "b"]


def test_scripts_without_spaces_are_cut():
    text = "你好。今天天气很好！我们去公园吧？好的，我们现在就去公园吧。"
    pieces = cut(text, 3, "zh")
    assert "".join(pieces) == text
    assert pieces[0] == "你好。今天天气很好！"
    assert all(reading_seconds(piece) <= 3 for piece in pieces)


def test_a_language_is_normalized_with_its_grammars(monkeypatch, tmp_path):
    """In place of the grammars, which take minutes to compile."""
    made = []

    class Normalizer:
        def __init__(self, input_case, lang, cache_dir):
            made.append((input_case, lang, cache_dir))

        def normalize(self, text, verbose):
            return text.replace("21", "twenty one")

    module = types.SimpleNamespace(Normalizer=Normalizer)
    name = "nemo_text_processing.text_normalization.normalize"
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    texts._normalizer.cache_clear()
    assert normalize("I am 21.", "en") == "I am twenty one."
    assert normalize("It is 21.", "en") == "It is twenty one."
    assert made == [("cased", "en", str(tmp_path / "llasa_jax" / "normalize"))]
    with pytest.raises(UserError, match="texts in 'xx' cannot be normalized; choose one of ar"):
        normalize("21", "xx")
    texts._normalizer.cache_clear()
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=r"llasa-jax\[normalize\]"):
        normalize("21", "en")
    texts._normalizer.cache_clear()


@pytest.mark.slow
def test_nemo_writes_a_number_out(monkeypatch, tmp_path):
    """Armenian has the smallest grammars."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    texts._normalizer.cache_clear()
    assert normalize("Ես 21 տարեկան եմ", "hy") == "Ես քսանմեկ տարեկան եմ"
    texts._normalizer.cache_clear()


class ContextCodec:
    """A tone whose level depends on what stands before it, as a real codec's sound does: without
    a crossfade the wave would jump where two pieces meet.
    """

    name, fingerprint, sample_rate, hop = "context", "f1", 16_000, 320

    def decode(self, codes):
        at = int(codes[0]) * self.hop + np.arange(len(codes) * self.hop)
        return ((0.3 + codes[0] / 1000) * np.sin(at / 20)).astype(np.float32)


def test_pieces_are_joined_without_clicks():
    codec, prompt = ContextCodec(), np.arange(0, 10)
    pieces = [np.arange(10, 60), np.arange(60, 90), np.arange(90, 200)]
    wave = sound.decode_pieces(codec, prompt, pieces)
    assert len(wave) == 190 * 320
    # Each piece in the context of the one before it, but for the crossfade at its end.
    alone = codec.decode(np.arange(0, 60))[10 * 320 :]
    np.testing.assert_array_equal(wave[: 49 * 320], alone[: 49 * 320])
    np.testing.assert_allclose(
        wave[80 * 320 :], codec.decode(np.arange(60, 200))[30 * 320 :], rtol=1e-6
    )
    bare = np.concatenate([alone, codec.decode(np.arange(10, 90))[50 * 320 :]])
    largest = np.abs(np.diff(alone)).max()
    assert np.abs(np.diff(wave)).max() < 1.4 * largest
    assert np.abs(np.diff(bare))[50 * 320 - 1] > np.abs(np.diff(wave))[50 * 320 - 1]


def test_silence_at_the_end_is_trimmed():
    voice = np.sin(np.arange(16_000) / 10).astype(np.float32)
    noise = np.random.default_rng(0).normal(0, 1e-4, 32_000).astype(np.float32)
    wave = np.concatenate([noise, voice, noise])
    for seconds, kept in ((0.5, 56_000), (0, 48_000), (10, 80_000)):
        np.testing.assert_array_equal(sound.trim_tail(wave, seconds, 16_000), wave[:kept])
    silence = np.zeros(1000, np.float32)
    assert len(sound.trim_tail(silence, 0, 16_000)) == 1000


def test_loudness_is_set_and_never_clips():
    rng = np.random.default_rng(0)
    wave = (rng.normal(0, 0.01, 48_000)).astype(np.float32)
    louder = sound.set_loudness(wave, -23, 16_000)
    assert pyloudnorm.Meter(16_000).integrated_loudness(louder) == pytest.approx(-23, abs=0.1)
    assert louder.dtype == np.float32
    assert np.abs(sound.set_loudness(wave, -1, 16_000)).max() == pytest.approx(1, abs=1e-6)
    for left in (wave[:100], np.zeros(48_000, np.float32)):
        np.testing.assert_array_equal(sound.set_loudness(left, -23, 16_000), left)
