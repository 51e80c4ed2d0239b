"""The original package's checkpoints in JAX against the package itself: equal codes and waves."""

import json
import re

import jax
import numpy as np
import pytest
import torch
from places import SPEECH
from safetensors.torch import load_file, save_file
from test_codec_original import CONFIG, folder, package  # noqa: F401  (fixtures)

from llasa_jax.codec import load_codec
from llasa_jax.codec.xcodec2_jax import load_jax
from llasa_jax.errors import UserError
from llasa_jax.speech.audio import read_audio


def test_codes_and_waves_are_those_of_the_package(folder):  # noqa: F811
    theirs = load_codec(folder)
    ours = load_jax(str(folder), CONFIG, devices=jax.devices()[:1])
    assert ours.fingerprint == theirs.fingerprint
    speech = [read_audio(path)[4000:20000] for path in sorted(SPEECH.glob("*.flac"))[::6]]
    codes, expected = ours.encode(speech), theirs.encode(speech)
    np.testing.assert_array_equal(np.concatenate(codes), np.concatenate(expected))
    np.testing.assert_allclose(ours.decode(codes[0]), theirs.decode(codes[0]), rtol=0, atol=1e-4)


BETA = "CodecEnc.conv_blocks.1.block.3.act.beta"
FILTER = "CodecEnc.conv_blocks.1.block.3.upsample.filter"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(BETA), "lacks acoustic_encoder.block.0.snake1.act.beta"),
        (lambda t: t.pop("fc_post_a.weight"), "lacks fc_post_a.weight"),
        (lambda t: t.update({"CodecEnc.extra": torch.zeros(1)}), "has the unknown CodecEnc.extra"),
        (lambda t: t.update({"fc_prior.bias": torch.zeros(3)}), "wrong shape for fc_encoder.bias"),
        (lambda t: t.update({FILTER: torch.zeros(1, 1, 12)}), f"{FILTER} is not XCodec2's"),
    ],
)  # fmt: skip
def test_loading_is_strict(folder, tmp_path, change, words):  # noqa: F811
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(UserError, match=re.escape(words)):
        load_jax(str(tmp_path), CONFIG)
