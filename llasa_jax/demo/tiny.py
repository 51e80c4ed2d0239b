"""Tiny seeded models of the real classes, for the demo and the tests."""

from pathlib import Path


def make_tiny_codec(folder: str | Path, seed: int = 0) -> Path:
    """Writes a seeded random `Xcodec2Model` of a few hundred thousand weights (65,536 codes of 320
    samples) and returns its folder.

    Its codes follow the sound (frames of different sound get different codes) but mean nothing:
    decoded, they are noise.
    """
    from transformers import Wav2Vec2BertConfig, Xcodec2Config

    semantic = Wav2Vec2BertConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        feature_projection_input_dim=160,
        conv_depthwise_kernel_size=5,
        left_max_position_embeddings=8,
        right_max_position_embeddings=8,
        apply_spec_augment=False,
    )
    config = Xcodec2Config(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        encoder_hidden_size=1,
        downsampling_ratios=(
            5,
            4,
            4,
            2,
            2,
        ),  # the real ones reversed: fewer samples in the costly early layers
        quantization_dim=64,
        semantic_model_config=semantic,
    )
    random_codec(config, seed).save_pretrained(folder)
    return Path(folder)


def random_codec(config, seed: int = 0):
    """An `Xcodec2Model` of seeded random weights that keep the size of what passes through them."""
    import torch
    from transformers import Xcodec2Model

    generator = torch.Generator().manual_seed(seed)
    model = Xcodec2Model(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                fan_in = weight[0].numel()
                # half as much into the quantizer, or its tanh saturates and only the outer two of
                # four levels are used
                gain = 0.5 if name == "quantizer.project_in.weight" else 1.0
                weight.normal_(0, gain * fan_in**-0.5, generator=generator)
            elif name.endswith(("alpha", "beta")):
                weight.normal_(0, 0.3, generator=generator)
            elif not name.endswith(".weight"):  # biases; what is left are the norms' ones
                weight.zero_()
    return model
