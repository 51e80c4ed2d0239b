"""The codec in JAX, chosen by the name of its device, wherever a codec is used."""

import json

import jax
import numpy as np
import pytest
from places import SPEECH
from tiny_run import make_model

from llasa_jax import cli
from llasa_jax.codec import Xcodec2Codec, load_codec
from llasa_jax.codec.xcodec2_jax import JaxCodec
from llasa_jax.data.records import open_utterances
from llasa_jax.demo.tiny import make_tiny_codec
from llasa_jax.encode.offline import encode
from llasa_jax.errors import UserError
from llasa_jax.generate.speaker import Speaker
from llasa_jax.inspect.model_checks import check_codec
from llasa_jax.train.samples import Samples
from llasa_jax.train.settings import LogSettings


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_codec(tmp_path_factory.mktemp("codec") / "tiny")


def test_the_device_chooses_the_implementation(folder):
    assert isinstance(load_codec(folder, "cpu"), Xcodec2Codec)
    for device, devices in (
        ("jax", jax.devices()),
        ("jax:3", jax.devices()[3:4]),
        ("jax:6,1,6", [jax.devices()[6], jax.devices()[1]]),
    ):
        codec = load_codec(folder, device)
        assert isinstance(codec, JaxCodec)
        assert codec.name == str(folder)
        assert list(codec._mesh.devices) == devices
    assert load_codec(folder, "jax", "bfloat16").precision == "bfloat16"
    with pytest.raises(UserError, match="'jax:8' is not available: JAX has devices 0 to 7"):
        load_codec(folder, "jax:8")


def test_a_broken_checkpoint_is_refused_in_a_sentence(folder, tmp_path):
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(UserError, match="the codec cannot be loaded"):
        load_codec(tmp_path, "jax")
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(UserError, match="the codec cannot be loaded"):
        load_codec(tmp_path, "jax")


def test_a_dataset_is_the_same_from_either(folder, tmp_path):
    clips = [{"audio": str(path), "text": path.stem} for path in sorted(SPEECH.glob("*_01.flac"))]
    lines = [json.dumps(clip) for clip in clips]
    (tmp_path / "manifest.jsonl").write_text("".join(f"{line}\n" for line in lines))
    records = {}
    for device in ("cpu", "jax:0"):
        encode(tmp_path / "manifest.jsonl", tmp_path / device, folder, device)
        records[device] = open_utterances(tmp_path / device, "train")
    assert len(records["cpu"]) == len(records["jax:0"]) == len(lines)
    for theirs, ours in zip(records["cpu"], records["jax:0"], strict=True):
        assert theirs.id == ours.id
        np.testing.assert_array_equal(theirs.codes, ours.codes)


@pytest.mark.parametrize(
    "command",
    [
        ["encode", "--manifest", "clips.jsonl", "--out", "codes"],
        ["import-hf-dataset", "hub/name", "codes", "--columns", "audio=audio,text=text"],
        ["generate", "--model", "run", "--text", "Hello.", "--out", "hello.wav"],
        ["doctor", "--config", "recipe.yaml"],
    ],
)
def test_commands_take_it(command):
    args, _ = cli.new_parser().parse_known_args([*command, "--device", "jax:2,3"])
    assert args.device == "jax:2,3"


def test_doctor_samples_and_a_speaker_use_it(folder, prompter, tmp_path):
    """A speaker's codec encodes the voices to clone as well."""
    metadata = {"codec": "any", "fingerprint": load_codec(folder).fingerprint}
    findings = check_codec(metadata, folder, "jax:1")
    assert [finding.severity for finding in findings] == ["ok"]
    settings = LogSettings(samples=["Hello."], codec=str(folder), codec_device="jax:1")
    speaker = Speaker.load(make_model(tmp_path / "tiny"), codec=folder, device="jax:1")
    for codec in (Samples(tmp_path, settings, prompter)._codec, speaker.codec):
        assert isinstance(codec, JaxCodec)
        assert list(codec._mesh.devices) == jax.devices()[1:2]
