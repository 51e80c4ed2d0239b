"""The small trained codec of the demo: one model for transformers and for us, and what it codes can
be told apart and heard.
"""

import json

import numpy as np
import pytest
import torch

from llasa_jax.codec import load_codec
from llasa_jax.demo import CODEC
from llasa_jax.speech.audio import read_audio

SPEECH = CODEC.parent / "speech"


@pytest.fixture(scope="module")
def waves():
    clips = [json.loads(line) for line in (SPEECH / "manifest.jsonl").read_text().splitlines()]
    return [read_audio(SPEECH / clip["audio"]) for clip in clips]


@pytest.fixture(scope="module")
def codec():
    return load_codec(CODEC)


def test_transformers_loads_every_tensor():
    from transformers import Xcodec2Model

    model, report = Xcodec2Model.from_pretrained(CODEC, output_loading_info=True)
    assert not any(report.values()), report
    assert model.dtype == torch.float32
    assert (CODEC / "model.safetensors").stat().st_size < 8e6


def test_codes_are_the_same_in_jax_and_torch(codec, waves):
    first = [wave[:12000] for wave in waves[:4]]
    ours = load_codec(CODEC, "jax:0").encode(first)
    np.testing.assert_array_equal(ours, codec.encode(first))


def test_frames_get_many_codes(codec, waves):
    codes = np.concatenate(codec.encode(waves))
    assert len(np.unique(codes)) > 0.6 * len(codes)


def bands(wave: np.ndarray) -> np.ndarray:
    """Logarithms of energies in 32 bands, 25 times a second."""
    frames = wave[: len(wave) // 640 * 640].reshape(-1, 640)
    power = np.square(np.abs(np.fft.rfft(frames * np.hanning(640))))[:, :320]
    return np.log(power.reshape(len(frames), 32, 10).sum(-1) + 1e-2)


def test_what_is_decoded_sounds_like_what_was_encoded(codec, waves):
    for wave, codes in zip(waves, codec.encode(waves), strict=True):
        before, after = bands(wave), bands(codec.decode(codes))[: len(wave) // 640]
        assert np.corrcoef(before.ravel(), after.ravel())[0, 1] > 0.9
