"""XCodec2 in JAX against transformers' `Xcodec2Model` in PyTorch: equal codes, equal waves."""

import json
import shutil

import jax
import numpy as np
import pytest
import torch
from places import SPEECH
from safetensors.torch import load_file, save_file
from small_codec import small_config, small_model
from transformers import Xcodec2Model

from llasa_jax.codec import load_codec
from llasa_jax.codec.xcodec2_jax import JaxCodec, load_jax
from llasa_jax.codec.xcodec2_jax.codec import padded_frames
from llasa_jax.errors import UserError
from llasa_jax.speech.audio import read_audio


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("codec")
    small_model().save_pretrained(folder)
    return folder


def load(folder, **rest) -> JaxCodec:
    return load_jax(str(folder), json.loads((folder / "config.json").read_text()), **rest)


@pytest.fixture(scope="module")
def torch_codec(folder):
    return load_codec(folder)


@pytest.fixture(scope="module")
def codec(folder):
    return load(folder, devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def speech():
    """Twenty clips of different lengths, all padded to 64 frames: few programs are compiled."""
    waves = [read_audio(path) for path in sorted(SPEECH.glob("*.flac"))[::2]]
    return [wave[3000 : 23400 - 491 * i] for i, wave in enumerate(waves)]


def edge_distance(torch_codec, wave) -> np.ndarray:
    """How far from an edge between two codes PyTorch's values of each frame lie."""
    found = []
    quantizer = torch_codec.model.quantizer.quantizer
    hook = quantizer.register_forward_pre_hook(
        lambda module, inputs: found.append(module.bound(inputs[0])[0].numpy())
    )
    torch_codec.encode([wave])
    hook.remove()
    return np.abs(np.abs(found[0] - np.floor(found[0])) - 0.5).min(-1)


def test_codes_of_clips_of_all_lengths(codec, torch_codec, speech):
    lengths = (1, 79, 319, 320, 321, 400, 639, 640, 5000, 15999, 16000, 20479)
    short = [np.tile(wave, 2)[:n] for wave, n in zip(speech, lengths, strict=False)]
    waves = [*speech, *short, np.zeros(3200, np.float32)]
    codes, expected = codec.encode(waves), torch_codec.encode(waves)
    assert [row.dtype for row in codes] == [np.uint16] * len(waves)
    different = 0
    for wave, row, theirs in zip(waves, codes, expected, strict=True):
        assert row.shape == theirs.shape
        frames = np.flatnonzero(row != theirs)
        different += len(frames)
        # Round-off decides on which side of an edge between two codes a value lies.
        assert not len(frames) or edge_distance(torch_codec, wave)[frames].max() < 1e-5
    assert different <= 1
    assert sum(map(len, codes)) > 1000
    assert min(len(np.unique(row)) for row in codes[: len(speech)]) >= 15  # or it proves little


def test_codes_of_a_long_clip(codec, torch_codec, speech, monkeypatch):
    """Longer than the acoustic encoder's window and than a block of queries."""
    monkeypatch.setattr("llasa_jax.codec.xcodec2_jax.encoder.WINDOW", 128)
    long = np.concatenate(speech)[: 300 * 320]
    np.testing.assert_array_equal(codec.encode([long])[0], torch_codec.encode([long])[0])


def test_a_clip_has_its_codes_in_any_batch_and_on_any_number_of_devices(folder, codec, speech):
    alone = [codec.encode([wave])[0] for wave in speech[:9]]
    over_eight = load(folder)
    assert over_eight._mesh.size == 8
    for order in (slice(None), slice(None, None, -1)):
        together = over_eight.encode(speech[:9][order])
        for row, expected in zip(together, alone[order], strict=True):
            np.testing.assert_array_equal(row, expected)
    assert codec.encode([]) == []


def test_few_sizes_of_batches(codec):
    assert [codec._rows(n, 64) for n in (1, 3, 4, 15, 16, 64, 500)] == [1, 1, 4, 4, 16, 64, 64]
    assert [codec._rows(n, 512) for n in (1, 4, 64)] == [1, 4, 16]
    assert codec._rows(64, 32768) == 1


def test_padded_lengths():
    assert [padded_frames(n) for n in (1, 64, 65, 128, 129, 300, 500, 513, 700, 800, 1025)] == [
        64, 64, 128, 128, 256, 384, 512, 768, 768, 1024, 1536,
    ]  # fmt: skip
    assert [padded_frames(n, 8) for n in (1, 64, 65, 129, 300, 1025)] == [8, 64, 72, 144, 320, 1152]


def test_padding_of_ljspeech_is_under_5_percent():
    # As benchmarks/lengths.py spreads them
    seconds = 1.1 + 9.0 * np.random.default_rng(0).beta(2.2, 1.4, 13_100)
    frames = (seconds * 50).astype(int) + 1
    padded = [padded_frames(int(n), 8) for n in frames]
    assert 1 - frames.sum() / sum(padded) < 0.05
    assert len(set(padded)) < 30


@pytest.mark.parametrize("frames", [1, 64, 200])
def test_decoded_waves(codec, torch_codec, frames):
    codes = np.random.default_rng(frames).integers(0, 65536, frames)
    wave, expected = codec.decode(codes), torch_codec.decode(codes)
    assert wave.dtype == np.float32
    assert wave.shape == expected.shape == (320 * frames,)
    np.testing.assert_allclose(wave, expected, rtol=0, atol=1e-4)
    assert np.abs(expected).max() > 0.1


def test_a_decoded_clip_does_not_depend_on_its_batch(folder, codec):
    clips = [np.random.default_rng(n).integers(0, 65536, n) for n in (5, 40, 64)]
    for wave, clip in zip(load(folder).decode_batch(clips), clips, strict=True):
        np.testing.assert_allclose(wave, codec.decode(clip), rtol=0, atol=1e-5)


def test_bad_waves_and_codes(codec):
    good = np.ones(400, np.float32)
    for bad in (np.zeros(0, np.float32), np.ones((2, 400), np.float32), np.full(400, np.nan)):
        with pytest.raises(UserError, match="clip 1 "):
            codec.encode([good, bad])
    for bad in (np.zeros(0, np.int64), np.array([-1]), np.array([65536]), np.array([0.5])):
        with pytest.raises(UserError, match="codes to decode"):
            codec.decode(bad)


def test_fingerprint_is_that_of_the_pytorch_codec(folder, codec, torch_codec, tmp_path):
    assert codec.fingerprint == torch_codec.fingerprint
    half = tmp_path / "half"
    Xcodec2Model.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(half)
    assert load_file(half / "model.safetensors")["fc_encoder.weight"].dtype == torch.bfloat16
    assert load(half).fingerprint == load_codec(half).fingerprint != codec.fingerprint


def test_a_checkpoint_in_several_files(codec, torch_codec, speech, tmp_path):
    torch_codec.model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    parts = load(tmp_path, devices=jax.devices()[:1])
    assert parts.fingerprint == codec.fingerprint
    np.testing.assert_array_equal(parts.encode(speech[:1])[0], codec.encode(speech[:1])[0])


BETA = "acoustic_encoder.block.0.res_unit1.snake1.act.beta"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.pop(BETA), f"lacks {BETA}"),
        (lambda tensors: tensors.update(extra=torch.zeros(2)), "has the unknown extra"),
        (lambda tensors: tensors.update({BETA: torch.zeros(5)}), f"has the wrong shape for {BETA}"),
    ],
)
def test_loading_is_strict(folder, tmp_path, change, words):
    shutil.copytree(folder, tmp_path / "codec")
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "codec/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError) as caught:
        load(tmp_path / "codec")
    assert words in str(caught.value)


def test_a_model_that_is_not_computed_here_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    config["semantic_model_config"]["position_embeddings_type"] = "rotary"
    with pytest.raises(UserError, match="does not compute this model's position_embeddings_type"):
        load_jax(str(folder), config)
    with pytest.raises(UserError, match="model_type 'llama'"):
        load_jax(str(folder), config | {"model_type": "llama"})


def test_precision(folder, codec, torch_codec, speech):
    with pytest.raises(UserError, match="precision 'float16' is unknown"):
        load(folder, precision="float16")
    expected = torch_codec.encode(speech[:8])
    low = load(folder, devices=jax.devices()[:1], precision="bfloat16")
    codes = low.encode(speech[:8])
    assert [len(row) for row in codes] == [len(row) for row in expected]
    changed = np.mean(np.concatenate(codes) != np.concatenate(expected))
    assert 0 < changed < 0.8  # of unrelated codes all differ
    wave = codec.decode(expected[0])
    np.testing.assert_allclose(low.decode(expected[0]), wave, atol=0.1 * np.abs(wave).max())


@pytest.mark.parametrize(("precision", "passes"), [("float32", "HIGHEST"), ("bfloat16_3x", "HIGH")])
def test_products_are_asked_for_in_the_precision(folder, precision, passes):
    codec = load(folder, devices=jax.devices()[:1], precision=precision)
    arrays = np.zeros((1, 64 * 320), np.float32), np.ones(1, np.int32)
    program = str(jax.make_jaxpr(codec._encode)(codec._encoder, *arrays))
    products = [line for line in program.splitlines() if "precision=" in line]
    assert len(products) > 30
    lower = [line for line in products if f"Precision.{passes})" not in line.replace("\n", "")]
    assert all("Precision.HIGHEST)" in line for line in lower)  # the mel features are always exact
    assert len(lower) < 5


def test_the_program_does_not_grow_with_depth(tmp_path):
    def length(layers: int, name: str) -> int:
        small_model(small_config(layers, layers)).save_pretrained(tmp_path / name)
        codec = load(tmp_path / name, devices=jax.devices()[:1])
        arrays = np.zeros((1, 64 * 320), np.float32), np.ones(1, np.int32)
        encoder = jax.make_jaxpr(codec._encode)(codec._encoder, *arrays)
        decoder = jax.make_jaxpr(codec._decode)(
            codec._decoder, arrays[0][:, :64].astype(np.int32), arrays[1]
        )
        return len(str(encoder).splitlines()) + len(str(decoder).splitlines())

    assert length(1, "shallow") == length(5, "deep")
