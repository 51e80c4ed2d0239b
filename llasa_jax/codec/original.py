"""The original `xcodec2` package's model behind the codec's interface, for checkpoints in its
format such as HKUSTAudio/xcodec2.

Its own `from_pretrained` is not used: under recent transformers that drops the SnakeBeta weights,
and it downloads w2v-bert-2.0 only to overwrite it with the checkpoint's. Nor is its `encode_code`,
which gives a batch the first clip's features.
"""

import importlib.util
import re
import sys
from collections.abc import Iterable
from types import ModuleType, SimpleNamespace
from unittest import mock

from llasa_jax.codec.xcodec2 import Xcodec2Codec, refuse_faults
from llasa_jax.errors import UserError

SEMANTIC_LAYERS = 16  # of w2v-bert's 24; the codec listens after the 16th


class OriginalXcodec2Codec(Xcodec2Codec):
    """`xcodec2.modeling_xcodec2.XCodec2Model` as a `Codec`; clips are prepared and batched as for
    transformers' model.
    """

    def _codes(self, waves, features):
        return self.model.encode_batch_feats(waves, features[:, None])

    def _wave(self, codes):
        return self.model.decode_code(codes)


def load_original(name: str, config: dict, device) -> OriginalXcodec2Codec:
    """Loads `model.safetensors` of a folder or hub id, given its config.json, onto a PyTorch
    device.

    Strict: every tensor of the checkpoint is used, the SnakeBeta `beta` among them (`bias` in the
    package), and every tensor of the model is in it. Raises `UserError` where that is not so, where
    the package cannot be imported, and where the file cannot be had.
    """
    from safetensors.torch import load_file
    from transformers.utils import cached_file

    modeling = import_package()
    tensors = {
        re.sub(r"\bact\.beta$", "act.bias", key): value
        for key, value in load_file(str(cached_file(name, "model.safetensors"))).items()
    }
    model = build(modeling, config, semantic_config(tensors))
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    # Weight norm is saved as g and v or as original0 and original1; PyTorch reads either.
    known = {
        re.sub(
            r"parametrizations\.weight\.original([01])$", lambda m: "weight_" + "gv"[int(m[1])], key
        ): key
        for key in shapes
    }
    tensors = {known.get(key, key): value for key, value in tensors.items()}
    faults: dict[str, Iterable[str]] = {
        "lacks": shapes.keys() - tensors.keys(),
        "has the unknown": tensors.keys() - shapes.keys(),
        "has the wrong shape for": [
            key for key in tensors.keys() & shapes.keys() if tensors[key].shape != shapes[key]
        ],
    }
    refuse_faults(
        name, faults, "get the whole checkpoint of HKUSTAudio/xcodec2, or use HKUSTAudio/xcodec2-hf"
    )
    model.load_state_dict(tensors, strict=True)
    del model.semantic_model.encoder.layers[SEMANTIC_LAYERS:]
    return OriginalXcodec2Codec(name, model.to(device))


def import_package() -> ModuleType:
    """The package's module `xcodec2.modeling_xcodec2`. Raises `UserError`, with the reason, where
    it cannot be imported.
    """
    import transformers  # noqa: F401  (it asks for torchaudio, and must find none)

    lacks_torchaudio = importlib.util.find_spec("torchaudio") is None
    if lacks_torchaudio:  # the package imports it and never uses it
        sys.modules["torchaudio"] = ModuleType("torchaudio")
    try:
        return importlib.import_module("xcodec2.modeling_xcodec2")
    except (ImportError, OSError) as error:
        raise UserError(
            f"the original codec's package cannot be imported ({error}); run `pip install"
            " 'llasa-jax[xcodec2]'` and `pip install --no-deps xcodec2==0.1.5` (it pins an old"
            " PyTorch), or use HKUSTAudio/xcodec2-hf, which needs neither."
        ) from error
    finally:
        if lacks_torchaudio:
            del sys.modules["torchaudio"]


def semantic_config(tensors: dict):
    """The `Wav2Vec2BertConfig` of w2v-bert-2.0, with as many layers as the checkpoint holds."""
    from transformers import PreTrainedConfig, Xcodec2Config

    config = Xcodec2Config().semantic_model_config
    assert isinstance(config, PreTrainedConfig)
    layers = [
        int(m[1])
        for key in tensors
        if (m := re.match(r"semantic_model\.encoder\.layers\.(\d+)\.", key))
    ]
    config.num_hidden_layers = max(layers, default=SEMANTIC_LAYERS - 1) + 1
    config.output_hidden_states = True
    if (
        "semantic_model.masked_spec_embed" not in tensors
    ):  # a vector for training alone, which a checkpoint may do without
        config.mask_time_prob = 0.0
    return config


def build(modeling: ModuleType, config: dict, semantic):
    """An `XCodec2Model` of the package with untrained weights; nothing is downloaded."""
    from transformers import Wav2Vec2BertModel

    from_config = SimpleNamespace(from_pretrained=lambda *_, **__: Wav2Vec2BertModel(semantic))
    no_features = SimpleNamespace(
        from_pretrained=lambda *_, **__: None
    )  # ours are those of w2v-bert-2.0's own extractor
    with mock.patch.multiple(
        modeling, Wav2Vec2BertModel=from_config, AutoFeatureExtractor=no_features
    ):
        return modeling.XCodec2Model(
            modeling.BigCodecConfig(
                **{k: v for k, v in config.items() if k not in ("dtype", "torch_dtype")}
            )
        )
