"""The parts of XCodec2 in JAX, each against PyTorch's or against the same without its short cut."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from places import SPEECH
from small_codec import small_config, small_model
from transformers import SeamlessM4TFeatureExtractor
from transformers.models.wav2vec2_bert.modeling_wav2vec2_bert import Wav2Vec2BertSelfAttention
from transformers.models.xcodec2 import modeling_xcodec2

from llasa_jax.codec.streaming import stream
from llasa_jax.codec.xcodec2_jax import decoder, encoder, layers
from llasa_jax.codec.xcodec2_jax.features import log_mel
from llasa_jax.codec.xcodec2_jax.layers import Span
from llasa_jax.codec.xcodec2_jax.quantizer import quantize, values_of
from llasa_jax.codec.xcodec2_jax.weights import open_weights
from llasa_jax.speech.audio import read_audio


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def weights(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("codec")
    model.save_pretrained(folder)
    return open_weights(str(folder), json.loads((folder / "config.json").read_text()))


def test_parameters_go_back_to_the_tensors_they_came_from(weights):
    tensors = {}
    for part in ("encoder", "decoder"):
        tensors |= weights.named(part, weights.part(part))
    assert tensors.keys() == {*weights.names} - {"semantic_encoder.masked_spec_embed"}
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor, weights.read(name))


def spans(*stops: int) -> Span:
    return Span(jnp.zeros(len(stops), jnp.int32), jnp.array(stops, jnp.int32))


@pytest.mark.parametrize(
    ("width", "stride", "dilation"), [(7, 1, 1), (7, 1, 9), (3, 1, 1), (4, 2, 1), (10, 5, 1)]
)
@pytest.mark.parametrize("length", [60, 63])
def test_convolutions_as_products(width, stride, dilation, length):
    """What TPUs are given, and what others are, against PyTorch's."""
    draw = np.random.default_rng(0).normal
    x, kernel = (draw(size=shape).astype(np.float32) for shape in ((2, 6, length), (5, 6, width)))
    expected = torch.nn.functional.conv1d(
        *map(torch.from_numpy, (x, kernel)), stride=stride, dilation=dilation, padding=2
    )
    arguments = x.transpose(0, 2, 1), kernel.transpose(2, 1, 0), stride, dilation, 2
    for way in (layers._conv_as_product, layers._conv):
        np.testing.assert_allclose(
            way(*map(jnp.asarray, arguments[:2]), *arguments[2:]).transpose(0, 2, 1),
            expected.numpy(),
            atol=1e-5,
        )


def test_a_dilation_that_is_known_when_it_runs():
    draw, dilations = np.random.default_rng(0).normal, (1, 3, 9)
    x = draw(size=(2, 6, 60)).astype(np.float32)
    weight = draw(size=(5, 6, 7)).astype(np.float32)
    bias = draw(size=5).astype(np.float32)
    p = {"weight": jnp.asarray(weight.transpose(2, 1, 0)), "bias": jnp.asarray(bias)}
    for number, dilation in enumerate(dilations):
        expected = torch.nn.functional.conv1d(
            *map(torch.from_numpy, (x, weight, bias)), dilation=dilation, padding=3 * dilation
        )
        for way in (layers._dilated_as_product, layers.conv_dilated):
            ours = way(jnp.asarray(x.transpose(0, 2, 1)), p, jnp.array(number), dilations)
            np.testing.assert_allclose(ours.transpose(0, 2, 1), expected.numpy(), atol=1e-5)


def test_features_are_those_of_the_extractor():
    extractor = SeamlessM4TFeatureExtractor()
    noise = np.random.default_rng(0).normal(size=6400).astype(np.float32)
    speech = [read_audio(path)[:6400] for path in sorted(SPEECH.glob("*.flac"))[::5]]
    offset = 0.3 + 1e-3 * noise  # a recording with a constant offset
    silent_end = np.where(np.arange(6400) < 3000, speech[0], 0).astype(np.float32)
    waves = [*speech, 0.5 * noise, 1e-4 * noise, offset, silent_end]
    lengths = np.resize([20, 13, 1, 7], len(waves))
    padded = np.stack(
        [
            np.where(np.arange(6400) < 320 * n, wave, 0)
            for wave, n in zip(waves, lengths, strict=True)
        ]
    ).astype(np.float32)
    features = np.asarray(jax.jit(log_mel)(padded, spans(*lengths)))
    for row, wave, n in zip(features, padded, lengths, strict=True):
        expected = extractor(np.pad(wave[: 320 * n], 160), sampling_rate=16000, return_tensors="np")
        np.testing.assert_allclose(row[:n], expected["input_features"][0], rtol=0, atol=2e-3)
        assert not row[n:].any()


@pytest.mark.parametrize("frames", [1, 5, 130, 300])
def test_attention_with_relative_keys(frames):
    """In blocks of queries, against PyTorch's layer, which makes the whole table of positions."""
    config = small_config().semantic_model_config
    torch.manual_seed(0)
    theirs = Wav2Vec2BertSelfAttention(config).eval()
    p = {
        name: {
            kind: jnp.asarray(weight.detach().numpy()) for kind, weight in part.named_parameters()
        }
        for name, part in theirs.named_children()
        if name != "dropout"
    }
    x = torch.randn(1, frames, config.hidden_size)
    theirs.config._attn_implementation = "eager"
    with torch.no_grad():
        expected = theirs(x)[0].numpy()
    for padding in (0, 40):
        padded = np.pad(x.numpy(), ((0, 0), (0, padding), (0, 0)), constant_values=9.0)
        ours = encoder._self_attention(jnp.asarray(padded), p, spans(frames), config)
        np.testing.assert_allclose(ours[:, :frames], expected, rtol=0, atol=2e-6)


def test_sine_squared():
    x = np.concatenate([np.linspace(-9, 9, 100_001), np.linspace(-8e3, 8e3, 100_001)])
    x = x.astype(np.float32)
    expected = np.sin(x.astype(np.float64)) ** 2
    np.testing.assert_allclose(jax.jit(encoder._sine_squared)(x), expected, rtol=0, atol=3e-7)


def test_filter_taps():
    expected = modeling_xcodec2.kaiser_sinc_filter1d(0.25, 0.3, 12).numpy().reshape(-1)
    np.testing.assert_allclose(encoder.kaiser_taps(), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("steps", [1, 2, 3, 50])
def test_activation(steps):
    theirs = modeling_xcodec2.Xcodec2AntiAliasedActivation1d(modeling_xcodec2.Xcodec2SnakeBeta(3))
    torch.manual_seed(0)
    with torch.no_grad():
        theirs.act.alpha.normal_()
        theirs.act.beta.normal_()
        x = torch.randn(1, 3, steps)
        expected = theirs(x).numpy()
    p = {"alpha": theirs.act.alpha.detach().numpy(), "beta": theirs.act.beta.detach().numpy()}
    # Between other values that a clip must not see.
    x = np.pad(x.numpy().transpose(0, 2, 1), ((0, 0), (4, 7), (0, 0)), constant_values=3.0)
    span = Span(jnp.array([4]), jnp.array([4 + steps]))
    ours = encoder._activation(jnp.asarray(x), p, span)[:, 4 : 4 + steps]
    np.testing.assert_allclose(ours, expected.transpose(0, 2, 1), rtol=0, atol=2e-6)


def test_pieces_of_an_activation_change_nothing(monkeypatch):
    generator = np.random.default_rng(0)
    x = generator.normal(size=(2, 640, 3)).astype(np.float32)
    p = {name: generator.normal(size=3).astype(np.float32) for name in ("alpha", "beta")}
    monkeypatch.setattr(encoder, "_CACHED", 2 * 3 * 64)
    for first, stop in (((0, 0), (640, 7)), ((130, 3), (131, 600)), ((64, 61), (128, 125))):
        span = Span(jnp.array(first), jnp.array(stop))
        pieces = jax.jit(encoder._activate_in_pieces)(x, p, span)
        whole = jax.jit(encoder._activate)(x, p, span)
        own = np.asarray(span.mask(640))
        np.testing.assert_allclose(pieces[own], whole[own], rtol=0, atol=2e-6)


def test_windows_of_a_long_clip_change_nothing(weights, monkeypatch):
    p = weights.part("encoder")["acoustic_encoder"]
    ratios = tuple(weights.config.downsampling_ratios)
    waves = np.random.default_rng(0).normal(size=(2, 200 * 320)).astype(np.float32)
    frames = np.array([200, 97], np.int32)
    waves[1, 97 * 320 :] = 0
    monkeypatch.setattr(encoder, "_CACHED", 1 << 30)  # its pieces are compared below
    whole, parts = [], []
    for window, result in ((512, whole), (64, parts)):
        monkeypatch.setattr(encoder, "WINDOW", window)
        run = jax.jit(lambda *batch: encoder.acoustic_encoder(p, *batch, ratios))
        result.extend(np.asarray(run(waves, frames)))
    for row in range(2):
        n = frames[row]
        # Round-off: the order of a convolution's sums depends on the length.
        largest = np.abs(whole[row][:n]).max()
        np.testing.assert_allclose(parts[row][:n], whole[row][:n], rtol=0, atol=2e-6 * largest)


def test_context_is_all_that_a_frame_hears(weights):
    """A sample moves frames as far away as `context_frames` says, and none further."""
    p = weights.part("encoder")["acoustic_encoder"]
    ratios, frames = tuple(weights.config.downsampling_ratios), np.array([128], np.int32)
    assert encoder.context_frames(ratios) == 32
    waves = np.random.default_rng(0).normal(size=(1, 128 * 320)).astype(np.float32)
    moved = waves.copy()
    moved[0, 64 * 320] += 10
    run = jax.jit(lambda *batch: encoder.acoustic_encoder(p, *batch, ratios)[0])
    same = np.asarray(run(waves, frames)) == np.asarray(run(moved, frames))
    changed = np.flatnonzero(~same.all(-1))
    assert 64 - 32 <= changed.min() < 64 - 5
    assert 64 + 5 < changed.max() <= 64 + 32


@pytest.mark.parametrize("levels", [(4,) * 8, (8, 5, 5, 3)])
def test_quantizer(levels):
    config = small_config()
    config.quantization_levels = list(levels)
    theirs = modeling_xcodec2.Xcodec2FiniteScalarQuantization(config)
    x = torch.randn(200, len(levels), generator=torch.Generator().manual_seed(0)) * 2
    x.requires_grad_()
    values, indices = theirs(theirs.bound(x))
    (values.square() * torch.arange(1, len(levels) + 1)).sum().backward()

    def loss(x):
        codes, values = quantize(x, levels)
        return (values**2 * np.arange(1, len(levels) + 1)).sum(), (codes, values)

    (_, (codes, ours)), gradient = jax.value_and_grad(loss, has_aux=True)(x.detach().numpy())
    np.testing.assert_array_equal(codes, indices.numpy())
    np.testing.assert_allclose(ours, values.detach().numpy(), rtol=0, atol=1e-6)
    np.testing.assert_allclose(gradient, x.grad.numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(values_of(codes, levels), ours, rtol=0, atol=1e-6)


def test_gradients_through_the_codes(tmp_path):
    """From the decoded wave through the quantizer to the encoder's weights, as PyTorch has them."""
    config = small_config()
    config.downsampling_ratios = [8, 8, 5]  # few blocks compile faster
    model = small_model(config)
    model.save_pretrained(tmp_path)
    weights = open_weights(str(tmp_path), json.loads((tmp_path / "config.json").read_text()))
    wave = np.random.default_rng(0).normal(size=(1, 8 * 320)).astype(np.float32) * 0.3
    target = np.random.default_rng(1).normal(size=(1, 8 * 320)).astype(np.float32) * 0.3
    extractor = SeamlessM4TFeatureExtractor()
    features = extractor(np.pad(wave[0], 160), sampling_rate=16000, return_tensors="pt")
    model.zero_grad()
    latents = model.encode(
        torch.from_numpy(wave)[:, None], features["input_features"], output_latents=True
    ).latents
    decoded = model.decode(latents=latents).audio_values[:, 0]
    (decoded - torch.from_numpy(target)).square().mean().backward()
    expected = {
        name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None
    }

    frames = np.array([8], np.int32)
    parameters = {part: weights.part(part) for part in ("encoder", "decoder")}

    @jax.jit
    @jax.grad
    def gradient(parameters):
        _, values = encoder.encode(parameters["encoder"], wave, frames, weights.config)
        decoded = decoder.decode_values(parameters["decoder"], values, frames, weights.config)
        return jnp.square(decoded - target).mean()

    gradients = gradient(parameters)
    for part, name in (
        ("encoder", "fc_encoder.weight"),
        ("encoder", "quantizer.project_in.weight"),
        ("encoder", "semantic_adapter.conv2.weight"),
        ("encoder", "acoustic_encoder.conv1.weight"),
        ("encoder", "acoustic_encoder.block.1.res_unit2.snake1.act.alpha"),
        ("encoder", "acoustic_encoder.block.2.conv1.bias"),
        ("decoder", "quantizer.project_out.weight"),
        ("decoder", "acoustic_decoder.embed.weight"),
        ("decoder", "acoustic_decoder.head.linear.weight"),
    ):
        ours = gradients[part]
        for step in name.split("."):
            ours = ours[step]
        if ours.ndim == 3:
            ours = ours.transpose(2, 1, 0)
        scale = expected[name].abs().max().item()
        assert scale > 0
        np.testing.assert_allclose(ours, expected[name].numpy(), rtol=0, atol=1e-3 * scale)


def test_memory_is_linear_in_the_length(weights):
    def size(frames: int) -> int:
        arguments = (
            weights.part("encoder"),
            jax.ShapeDtypeStruct((1, frames * 320), jnp.float32),
            jax.ShapeDtypeStruct((1,), jnp.int32),
        )
        run = jax.jit(lambda *batch: encoder.encode(*batch, weights.config)[0])
        return run.lower(*arguments).compile().memory_analysis().temp_size_in_bytes

    assert size(6144) < 3.5 * size(2048)


def windowed(codes: np.ndarray) -> np.ndarray:
    """A decoder that hears 2 codes to each side, and tells how many codes it got."""
    windowed.longest = max(windowed.longest, len(codes))
    padded = np.pad(codes.astype(np.float32), 2)
    return np.repeat(np.convolve(padded, np.ones(5, np.float32), "valid"), 320)


@pytest.mark.parametrize("piece", [1, 7, 500])
def test_a_stream_is_the_whole_where_the_decoder_hears_no_further_than_the_context(piece):
    windowed.longest = 0
    codes = np.random.default_rng(0).integers(0, 9, 333)
    pieces = (codes[i : i + piece] for i in range(0, len(codes), piece))
    chunks = list(stream(windowed, pieces, chunk=20, context=10, look_ahead=5))
    assert [len(chunk) // 320 for chunk in chunks] == [20] * 16 + [13]
    assert windowed.longest == 35
    # A chunk's last frames hear two codes on, and the look-ahead has five.
    np.testing.assert_allclose(np.concatenate(chunks), windowed(codes), rtol=1e-5)


def test_a_stream_gives_a_chunk_as_soon_as_its_look_ahead_is_there():
    windowed.longest = 0
    taken = []

    def come():
        for code in range(60):
            taken.append(code)
            yield np.array([code])

    chunks = stream(windowed, come(), chunk=20, context=10, look_ahead=5)
    next(chunks)
    assert len(taken) == 25
    next(chunks)
    assert len(taken) == 45


def test_a_stream_whose_windows_hold_all_is_decoded_whole(weights):
    from llasa_jax.codec.xcodec2_jax import JaxCodec

    codec = JaxCodec("small", weights, devices=jax.devices()[:1])
    codes = np.random.default_rng(0).integers(0, 65536, 60)
    whole = codec.decode(codes)
    assert whole.flags.writeable
    chunks = list(codec.stream([codes], chunk=60, look_ahead=0))
    np.testing.assert_array_equal(np.concatenate(chunks), whole)
    # Two chunks, blended where they meet: both windows are the whole, so they agree up to the
    # rounding of the blend.
    chunks = list(codec.stream([codes], chunk=30, context=60, look_ahead=30))
    assert len(chunks) == 2
    np.testing.assert_allclose(np.concatenate(chunks), whole, rtol=0, atol=1e-6)


def test_a_stream_of_nothing():
    assert list(stream(windowed, [])) == []
    assert list(stream(windowed, [np.zeros(0, np.int64)])) == []
