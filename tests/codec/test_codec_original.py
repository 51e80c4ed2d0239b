"""The original `xcodec2` package's model against transformers' own, with the same weights: equal
codes and an equal wave.
"""

import functools
import json
import re
import sys

import numpy as np
import pytest
import torch
from places import SPEECH
from safetensors.torch import load_file, save_file
from transformers import Xcodec2Config, Xcodec2Model

from llasa_jax.codec import Xcodec2Codec, load_codec
from llasa_jax.codec import original as codec_original
from llasa_jax.errors import UserError
from llasa_jax.speech.audio import read_audio

CONFIG = {
    "semantic_hidden_size": 1024,
    "codec_encoder_hidden_size": 1024,
    "codec_decoder_hidden_size": 1024,
    "use_vocos": True,
}


@pytest.fixture(scope="module")
def package():
    """The package's module, with the real classes made small where they can be told to be."""
    torch.set_num_threads(1)
    try:
        modeling = codec_original.import_package()
    except UserError as error:
        pytest.skip(f"the original codec cannot be compared with transformers' here: {error}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            modeling,
            "CodecEncoder_Transformer",
            functools.partial(modeling.CodecEncoder_Transformer, ngf=2),
        )
        patch.setattr(
            modeling, "CodecDecoderVocos", functools.partial(modeling.CodecDecoderVocos, depth=1)
        )
        config = codec_original.semantic_config
        patch.setattr(codec_original, "semantic_config", lambda tensors: small(config(tensors)))
        yield modeling


def small(config):
    config.intermediate_size = 64
    return config


@pytest.fixture(scope="module")
def folder(package, tmp_path_factory):
    """A seeded random checkpoint as the hub's is: `beta`, not the package's `bias`, weight norm's
    older names, one layer too many.
    """
    config = codec_original.semantic_config(
        {"semantic_model.encoder.layers.16.": None, "semantic_model.masked_spec_embed": None}
    )
    model = codec_original.build(package, CONFIG, config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "act." in name:
                weight.normal_(0, 0.3, generator=generator)
            elif weight.ndim > 1:
                gain = 0.5 if name == "generator.quantizer.project_in.weight" else 1.0
                weight.normal_(0, gain * weight[0].numel() ** -0.5, generator=generator)
            elif weight.ndim == 1 and not name.endswith("weight"):
                weight.normal_(0, 0.1, generator=generator)
    folder = tmp_path_factory.mktemp("original")
    (folder / "config.json").write_text(json.dumps(CONFIG | {"model_type": "xcodec2"}))
    names = (
        ("act.bias", "act.beta"),
        ("parametrizations.weight.original0", "weight_g"),
        ("parametrizations.weight.original1", "weight_v"),
    )
    tensors = {
        functools.reduce(lambda key, pair: key.replace(*pair), names, key): value
        for key, value in model.state_dict().items()
    }
    save_file(tensors, folder / "model.safetensors")
    return folder


def to_transformers(model, config) -> dict:
    """The tensors of the package's model under transformers' names."""
    unit = {"0": "snake1", "1": "conv1", "2": "snake2", "3": "conv2"}
    block = {"0": "res_unit1", "1": "res_unit2", "2": "res_unit3", "3": "snake1", "4": "conv1"}
    rules = (
        (r"^semantic_model\.", lambda m: "semantic_encoder."),
        (r"^SemanticEncoder_module\.initial_conv", lambda m: "semantic_adapter.conv1"),
        (
            r"^SemanticEncoder_module\.residual_blocks\.([13])",
            lambda m: f"semantic_adapter.conv{2 if m[1] == '1' else 3}",
        ),
        (r"^SemanticEncoder_module\.final_conv", lambda m: "semantic_adapter.conv4"),
        (r"^CodecEnc\.conv_blocks\.0\.", lambda m: "acoustic_encoder.conv1."),
        (r"^CodecEnc\.conv_final_block\.0\.", lambda m: "acoustic_encoder.snake1."),
        (r"^CodecEnc\.conv_final_block\.1\.", lambda m: "acoustic_encoder.conv2."),
        (
            r"^CodecEnc\.conv_blocks\.(\d)\.block\.(\d)\.block\.(\d)",
            lambda m: f"acoustic_encoder.block.{int(m[1]) - 1}.{block[m[2]]}.{unit[m[3]]}",
        ),
        (
            r"^CodecEnc\.conv_blocks\.(\d)\.block\.(\d)",
            lambda m: f"acoustic_encoder.block.{int(m[1]) - 1}.{block[m[2]]}",
        ),
        (r"act\.bias$", lambda m: "act.beta"),
        (r"^fc_prior", lambda m: "fc_encoder"),
        (r"^fc_post_a", lambda m: "acoustic_decoder.fc"),
        (r"^generator\.quantizer", lambda m: "quantizer"),
        (r"^generator\.backbone\.transformers", lambda m: "acoustic_decoder.layers"),
        (r"^generator\.backbone\.final_layer_norm", lambda m: "acoustic_decoder.norm"),
        (r"^generator\.backbone", lambda m: "acoustic_decoder"),
        (r"^generator\.head\.out", lambda m: "acoustic_decoder.head.linear"),
        (r"att_norm", lambda m: "input_layernorm"),
        (r"ffn_norm", lambda m: "post_attention_layernorm"),
        (r"att\.c_proj", lambda m: "self_attn.o_proj"),
    )
    for module in model.modules():
        if torch.nn.utils.parametrize.is_parametrized(module):
            torch.nn.utils.parametrize.remove_parametrizations(module, "weight")
    tensors = {}
    for key, value in model.state_dict().items():
        if key.endswith((".filter", ".window")):  # constants, which transformers computes
            continue
        for pattern, name in rules:
            key = re.sub(pattern, name, key)
        if "c_attn" in key:
            for letter, rows in zip("qkv", value.chunk(3), strict=True):
                # torchtune turns neighbouring pairs of a head's values, transformers the two halves
                pairs = rows.view(config.num_attention_heads, -1, 2, rows.shape[1])
                rows = rows if letter == "v" else pairs.transpose(1, 2).reshape(rows.shape)
                tensors[key.replace("att.c_attn", f"self_attn.{letter}_proj")] = rows
        else:
            tensors[key] = value
    return tensors


def test_codes_and_waves_are_those_of_transformers(folder):
    original = load_codec(folder)
    assert isinstance(original, codec_original.OriginalXcodec2Codec)
    speech = [read_audio(path)[4000:20000] for path in sorted(SPEECH.glob("*.flac"))[::6]]
    clips = [*speech, speech[0][:12345], speech[1][:12345], speech[2][:12160], speech[3][:319]]
    codes = original.encode(clips)
    assert [len(row) for row in codes] == [len(clip) // 320 + 1 for clip in clips]
    assert min(len(np.unique(row)) for row in codes[:3]) >= 15  # or equal codes would prove nothing
    # In a batch as alone, and alone as the package itself has it; round-off may flip a value that
    # lies on a rounding edge.
    alone = [original.encode([clip])[0] for clip in clips]
    assert np.mean(np.concatenate(codes) != np.concatenate(alone)) < 1e-3
    original.model.feature_extractor = lambda wave, **rest: SimpleFeatures(original, wave)
    plain = [
        original.model.encode_code(torch.from_numpy(clip)[None])[0, 0].numpy() for clip in clips
    ]
    np.testing.assert_array_equal(np.concatenate(plain), np.concatenate(alone))
    wave = original.decode(codes[0])

    config = Xcodec2Config(num_hidden_layers=1, encoder_hidden_size=2)
    config.semantic_model_config.intermediate_size = 64
    model = Xcodec2Model(config)
    model.load_state_dict(to_transformers(original.model, config), strict=True)
    theirs = Xcodec2Codec("transformers", model)
    # Weight norm's product in another order, and other kernels: round-off again.
    assert np.mean(np.concatenate(theirs.encode(clips)) != np.concatenate(codes)) < 2e-3
    np.testing.assert_allclose(
        theirs.decode(codes[0]), wave, rtol=1e-3, atol=1e-3 * np.abs(wave).max()
    )


class SimpleFeatures:
    """What the package takes from w2v-bert-2.0's extractor, which it downloads."""

    def __init__(self, codec, wave):
        self.input_features = codec._mel(wave.numpy(), sampling_rate=16000, return_tensors="pt")[
            "input_features"
        ]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda t: t.pop("CodecEnc.conv_blocks.1.block.3.act.beta"),
            "lacks CodecEnc.conv_blocks.1.block.3.act.bias",
        ),
        (lambda t: t.update({"CodecEnc.extra": torch.zeros(1)}), "has the unknown CodecEnc.extra"),
        (
            lambda t: t.update({"fc_prior.bias": torch.zeros(3)}),
            "has the wrong shape for fc_prior.bias",
        ),
    ],
)
def test_loading_is_strict(folder, tmp_path, change, words):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(UserError, match=re.escape(words)):
        load_codec(tmp_path)


def test_without_the_package_the_error_says_how_to_get_it(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    monkeypatch.setitem(sys.modules, "xcodec2.modeling_xcodec2", None)
    with pytest.raises(UserError, match=r"pip install --no-deps xcodec2==0\.1\.5"):
        load_codec(tmp_path)


def test_a_checkpoint_without_its_weights_is_refused(package, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(UserError, match="model.safetensors"):
        load_codec(tmp_path)
