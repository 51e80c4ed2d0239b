"""A small XCodec2 with all the parts of the real one, and random weights."""

import torch
from transformers import Wav2Vec2BertConfig, Xcodec2Config, Xcodec2Model


def small_config(semantic_layers: int = 2, decoder_layers: int = 2) -> Xcodec2Config:
    semantic = Wav2Vec2BertConfig(
        hidden_size=32,
        num_hidden_layers=semantic_layers,
        num_attention_heads=2,
        intermediate_size=64,
        feature_projection_input_dim=160,
        conv_depthwise_kernel_size=7,
        left_max_position_embeddings=12,
        right_max_position_embeddings=4,
    )
    return Xcodec2Config(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=decoder_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        encoder_hidden_size=2,
        quantization_dim=96,
        semantic_model_config=semantic,
    )


def small_model(config: Xcodec2Config | None = None, seed: int = 0) -> Xcodec2Model:
    """Weights of the size that keeps activations near 1, so that every part shows in the codes."""
    generator = torch.Generator().manual_seed(seed)
    model = Xcodec2Model(config or small_config()).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                gain = 0.5 if name == "quantizer.project_in.weight" else 1.0
                weight.normal_(0, gain * weight[0].numel() ** -0.5, generator=generator)
            elif name.endswith(".weight"):
                weight.normal_(1, 0.1, generator=generator)
            else:
                weight.normal_(0, 0.1, generator=generator)
    return model
