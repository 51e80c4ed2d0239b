"""The codec against transformers' own XCodec2: same input, same codes, in any batch; and strict
about what it loads.
"""

import importlib.util
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from places import SPEECH
from safetensors.torch import load_file, save_file

from llasa_jax.codec import load_codec
from llasa_jax.demo.tiny import make_tiny_codec
from llasa_jax.errors import UserError
from llasa_jax.speech.audio import read_audio


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.set_num_threads(1)  # on busy cores, OpenMP's waiting threads make a minute of a second
    return make_tiny_codec(tmp_path_factory.mktemp("codec") / "tiny")


@pytest.fixture(scope="module")
def codec(folder):
    return load_codec(folder)


@pytest.fixture(scope="module")
def speech():
    return [read_audio(path) for path in sorted(SPEECH.glob("*.flac"))[::4]]


@pytest.fixture(scope="module")
def huggingface_inputs():
    """transformers' Xcodec2FeatureExtractor itself, given the one function that it needs of
    torchaudio.

    Its docstring says that its features are SeamlessM4TFeatureExtractor's; those are what stands in
    for Kaldi's fbank.
    """
    path = Path(transformers.__file__).parent / "models/xcodec2/feature_extraction_xcodec2.py"
    spec = importlib.util.spec_from_file_location(
        "transformers.models.xcodec2.feature_extraction_for_this_test", path
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    seamless = transformers.SeamlessM4TFeatureExtractor()

    def fbank(waveform, **settings):
        assert settings["num_mel_bins"] == 80
        assert (
            settings["frame_length"],
            settings["frame_shift"],
            settings["sample_frequency"],
        ) == (25.0, 10.0, 16000)
        assert (
            settings["window_type"],
            settings["preemphasis_coefficient"],
            settings["low_freq"],
        ) == ("povey", 0.97, 20)
        assert (settings["snip_edges"], settings["remove_dc_offset"]) == (True, True)
        return torch.from_numpy(seamless._extract_fbank_features((waveform / 2**15).numpy()))

    module.torchaudio = SimpleNamespace(
        compliance=SimpleNamespace(kaldi=SimpleNamespace(fbank=fbank))
    )
    return module.Xcodec2FeatureExtractor()


@pytest.mark.parametrize("samples", [1, 79, 319, 320, 321, 400, 639, 640, 16000, 15999, 12345])
def test_codes_are_those_of_transformers_called_plainly(
    folder, codec, speech, huggingface_inputs, samples
):
    wave = np.tile(speech[3], 2)[4000 : 4000 + samples]
    inputs = huggingface_inputs(audio=wave, sampling_rate=16000, return_tensors="pt")
    model = transformers.Xcodec2Model.from_pretrained(folder).eval()
    with torch.inference_mode():
        expected = model.encode(**inputs).audio_codes[0, 0].numpy()
    (codes,) = codec.encode([wave])
    assert codes.dtype == np.uint16
    assert codes.shape == (samples // 320 + 1,)
    np.testing.assert_array_equal(codes, expected)


def test_a_batch_gives_each_clip_its_own_codes(codec, speech):
    whole = [wave[:12000] for wave in speech]
    ragged = [
        wave[: 12000 - 7 * i] for i, wave in enumerate(speech)
    ]  # some of one padded length, some not
    waves = [clip for pair in zip(whole, ragged, strict=True) for clip in pair] + speech
    together, alone = codec.encode(waves), [codec.encode([wave])[0] for wave in waves]
    assert [len(row) for row in together] == [len(row) for row in alone]
    assert (
        np.mean(np.concatenate(together) != np.concatenate(alone)) < 1e-3
    )  # round-off may flip a value on a rounding edge


def test_a_batch_is_bounded_in_samples(codec, speech, monkeypatch):
    sizes = []
    encode = codec.model.encode
    monkeypatch.setattr(
        codec.model,
        "encode",
        lambda values, **rest: sizes.append(tuple(values.shape)) or encode(values, **rest),
    )
    monkeypatch.setattr("llasa_jax.codec.xcodec2.MAX_BATCH_SAMPLES", 20000)
    waves = [wave[:8000] for wave in speech[:5]] + [np.tile(speech[0], 2)]
    codes = codec.encode(waves)
    assert [len(row) for row in codes] == [len(wave) // 320 + 1 for wave in waves]
    assert sorted(size[0] for size in sizes) == [1, 1, 2, 2]
    assert all(size[0] == 1 or np.prod(size) <= 20000 for size in sizes)


def test_tiny_codes_are_as_diverse_as_speech(codec, speech):
    codes = codec.encode(speech)
    assert min(len(np.unique(row)) for row in codes) >= 20
    for i, a in enumerate(codes):
        for b in codes[:i]:
            frames = min(len(a), len(b))
            assert np.mean(a[:frames] == b[:frames]) < 0.1


def test_tiny_codec_depends_on_its_seed_alone(folder, tmp_path):
    first, again, other = (
        load_file(path / "model.safetensors")
        for path in (folder, make_tiny_codec(tmp_path / "a"), make_tiny_codec(tmp_path / "b", 1))
    )
    assert [name for name in first if not torch.equal(first[name], again[name])] == []
    assert not torch.equal(first["fc_encoder.weight"], other["fc_encoder.weight"])


def test_decode(codec, speech):
    (codes,) = codec.encode(speech[:1])
    wave = codec.decode(codes)
    assert wave.dtype == np.float32
    assert wave.shape == (320 * len(codes),)
    assert np.isfinite(wave).all()
    assert np.abs(wave).max() > 1e-4
    assert codec.decode(np.array([0, 65535])).shape == (640,)


def test_same_codes_every_time_also_from_a_model_in_train_mode(folder, codec, speech):
    from llasa_jax.codec import Xcodec2Codec

    model = transformers.Xcodec2Model.from_pretrained(folder)
    model.semantic_encoder.train()
    again = Xcodec2Codec("again", model)
    np.testing.assert_array_equal(again.encode(speech[:1])[0], codec.encode(speech[:1])[0])
    np.testing.assert_array_equal(again.encode(speech[:1])[0], again.encode(speech[:1])[0])


def test_bad_waves_and_codes(codec):
    good = np.ones(400, np.float32)
    for bad in (
        np.zeros(0, np.float32),
        np.ones((2, 400), np.float32),
        np.full(400, np.nan, np.float32),
        np.full(400, np.inf, np.float32),
    ):
        with pytest.raises(UserError, match="clip 1 "):
            codec.encode([good, bad])
    for bad in (
        np.zeros(0, np.int64),
        np.array([-1]),
        np.array([65536]),
        np.array([0.5]),
        np.zeros((1, 2), np.int64),
    ):
        with pytest.raises(UserError, match="codes to decode"):
            codec.decode(bad)
    assert codec.encode([]) == []


def test_fingerprint_follows_the_meaning_of_codes(folder, codec, tmp_path):
    assert codec.fingerprint == load_codec(folder).fingerprint
    assert codec.fingerprint != load_codec(make_tiny_codec(tmp_path / "other", seed=1)).fingerprint
    for name, same in (
        ("acoustic_decoder.fc.weight", True),
        ("quantizer.project_in.weight", False),
        ("fc_encoder.bias", False),
        ("acoustic_encoder.block.0.conv1.weight", False),
        ("semantic_encoder.encoder.layers.0.ffn1.output_dense.weight", False),
        ("semantic_adapter.conv1.weight", False),
    ):
        changed = altered(
            folder, tmp_path / name, lambda tensors, name=name: tensors[name].mul_(1.01).add_(0.01)
        )
        assert (load_codec(changed).fingerprint == codec.fingerprint) is same


def altered(folder, to, change):
    shutil.copytree(folder, to)
    tensors = load_file(to / "model.safetensors")
    change(tensors)
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


def rename(tensors, old, new):
    tensors[new] = tensors.pop(old)


BETA = "acoustic_encoder.block.0.res_unit1.snake1.act.beta"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.pop(BETA), f"lacks {BETA}"),
        (
            lambda tensors: rename(tensors, BETA, BETA.replace("beta", "bias")),
            f"lacks {BETA} and has the unknown",
        ),
        (lambda tensors: tensors.update(extra=torch.zeros(2)), "has the unknown extra"),
        (lambda tensors: tensors.update({BETA: torch.zeros(5)}), f"has the wrong shape for {BETA}"),
        (
            lambda tensors: tensors.pop(
                "semantic_encoder.encoder.layers.0.ffn1.output_dense.weight"
            ),
            "lacks semantic_encoder",
        ),
    ],
)
def test_loading_is_strict(folder, tmp_path, change, words):
    with pytest.raises(UserError) as caught:
        load_codec(altered(folder, tmp_path / "codec", change))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"model_type": "llama"}, "model_type 'llama'"),
        ({"quantization_levels": [4] * 7}, "16384 codes"),
        ({"downsampling_ratios": [2, 2, 4, 4]}, "of 64 samples"),
    ],
)
def test_another_model_is_refused(folder, tmp_path, setting, words):
    shutil.copytree(folder, tmp_path / "codec")
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "codec/config.json").write_text(json.dumps({**config, **setting}))
    with pytest.raises(UserError) as caught:
        load_codec(tmp_path / "codec")
    assert words in str(caught.value)


def test_a_folder_that_is_no_codec_is_refused(folder, tmp_path):
    def refused(name, words, **rest):
        with pytest.raises(UserError) as caught:
            load_codec(name, **rest)
        assert str(name) in str(caught.value) or rest
        assert words in str(caught.value)

    refused(tmp_path / "none", "no such codec folder")
    refused(tmp_path, "no config.json")
    shutil.copytree(folder, tmp_path / "codec")
    (tmp_path / "codec/model.safetensors").write_bytes(b"\0" * 100)
    refused(tmp_path / "codec", "cannot be loaded")
    (tmp_path / "codec/model.safetensors").unlink()
    refused(tmp_path / "codec", "cannot be loaded")
    torch.save(
        transformers.Xcodec2Model.from_pretrained(folder).state_dict(),
        tmp_path / "codec/pytorch_model.bin",
    )
    refused(tmp_path / "codec", "cannot be loaded")  # a pickle is never opened
    (tmp_path / "codec/config.json").write_text("{")
    refused(tmp_path / "codec", "cannot be loaded")
    refused(folder, "not available", device="nonsense")


def test_hub_names_go_through_from_pretrained(folder, monkeypatch):
    asked = []
    config = json.loads((folder / "config.json").read_text())
    load = transformers.Xcodec2Model.from_pretrained
    monkeypatch.setattr(transformers.PreTrainedConfig, "get_config_dict", lambda name: (config, {}))
    monkeypatch.setattr(
        transformers.Xcodec2Model,
        "from_pretrained",
        lambda name, **rest: asked.append((name, rest)) or load(folder, **rest),
    )
    assert load_codec().name == "HKUSTAudio/xcodec2-hf"
    assert asked[0][0] == "HKUSTAudio/xcodec2-hf"
    assert asked[0][1]["use_safetensors"] is True
