"""Trains a small XCodec2 on synthetic speech: `python benchmarks/train_codec.py`.

An `Xcodec2Config` of 2.7 million parameters learns to code the four voices of flite (Debian's
package flite; slt, rms and awb are built from recordings of people): numbers, times and words drawn
from CMU's pronouncing dictionary, `--hours` of them, one fixed seed. The encoder and decoder are
llasa-jax's own, differentiated through the quantizer. The losses are distances of logarithmic mel
spectrograms and of spectrograms at three resolutions. There is no discriminator.

The acoustic encoder, whose layers run at the rate of samples, stays silent: its last convolution is
zero and is not trained, so the codes come from the log-mel features alone, 50 times a second. That
makes a step cheap enough for one core.

Stop it at any time: the same command goes on from the last checkpoint, and at `--steps` writes
`FOLDER/codec`, which transformers' `Xcodec2Model` and `load_codec` open. `--evaluate` says how much
of the codebook is used and what pocketsphinx understands of sentences that were not trained on,
before and after the codec.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import optax
import soundfile

from llasa_jax.codec.interface import HOP
from llasa_jax.codec.xcodec2_jax import decoder, encoder
from llasa_jax.codec.xcodec2_jax.features import log_mel
from llasa_jax.codec.xcodec2_jax.layers import Span, linear
from llasa_jax.codec.xcodec2_jax.quantizer import quantize
from llasa_jax.codec.xcodec2_jax.weights import open_weights
from llasa_jax.speech.audio import SAMPLE_RATE

VOICES = "slt", "rms", "awb", "kal16"
FRAMES, CLIPS = 64, 8  # of a batch: 10 seconds
SAVE_EVERY = 250
SPECTRA = ((256, 64), (512, 128), (1024, 256))  # sizes and hops
NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine",
    "ten", "eleven", "twelve", "thirteen", "fifteen", "twenty", "thirty", "forty", "fifty",
    "sixty", "seventy", "eighty", "ninety", "hundred", "thousand",
)  # fmt: skip


def sentences(count: int, seed: int) -> list[str]:
    """Numbers, times and words of the dictionary."""
    from pocketsphinx import get_model_path

    words = [
        line.split()[0]
        for line in Path(get_model_path("en-us/cmudict-en-us.dict")).read_text().splitlines()
    ]
    words = [word for word in words if word.isalpha() and 2 < len(word) < 10]
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        numbers = " ".join(rng.choice(NUMBERS, rng.integers(3, 7)))
        kind = rng.integers(4)
        if kind == 0:
            made.append(numbers)
        elif kind == 1:  # a time
            made.append(f"at {rng.integers(1, 13)} {rng.integers(10, 60)} {numbers}")
        else:
            made.append(" ".join(rng.choice(words, rng.integers(4, 9))))
    return made


def speak(text: str, voice: str) -> np.ndarray:
    """Flite's voice, int16 at 16 kHz."""
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/a.wav"
        subprocess.run(["flite", "-voice", voice, "-t", text, "-o", file], check=True)
        wave, rate = soundfile.read(file, dtype="int16")
    assert rate == SAMPLE_RATE, f"flite's {voice} speaks at {rate} Hz"
    return wave


def corpus(hours: float, file: Path) -> np.ndarray:
    """All sentences one after the other, int16; kept in `file`."""
    if not file.exists():
        count = int(hours * 3600 / 2.6)  # a sentence takes about as many seconds
        texts = sentences(count, seed=0)
        with ThreadPoolExecutor(2) as pool:
            waves = list(pool.map(speak, texts, (VOICES * count)[:count]))
        np.save(file, np.concatenate(waves))
    return np.load(file)


def make_model(folder: Path) -> None:
    """Random weights; the acoustic encoder gives zeros."""
    import torch
    from transformers import Wav2Vec2BertConfig, Xcodec2Config

    from llasa_jax.demo.tiny import random_codec

    semantic = Wav2Vec2BertConfig(
        hidden_size=96,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=192,
        feature_projection_input_dim=160,
        conv_depthwise_kernel_size=5,
        left_max_position_embeddings=16,
        right_max_position_embeddings=8,
        apply_spec_augment=False,
    )
    config = Xcodec2Config(
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=48,
        encoder_hidden_size=1,
        downsampling_ratios=(5, 4, 4, 2, 2),  # few samples in the costly early layers
        quantization_dim=288,  # the sum of both widths
        semantic_model_config=semantic,
    )
    model = random_codec(config)
    with torch.no_grad():
        model.acoustic_encoder.conv2.weight.zero_()
        model.acoustic_encoder.conv2.bias.zero_()
        head = model.acoustic_decoder.head.linear
        head.bias[: head.out_features // 2] = -2  # as loud as speech, about
    model.save_pretrained(folder)


def encode(params: dict, wave_BS: jax.Array, frames_B: np.ndarray, config):
    """As `encoder.encode` where the acoustic encoder gives zeros."""
    span = Span(jnp.zeros_like(frames_B), frames_B)
    x_BTD = encoder.semantic_encoder(
        params["semantic_encoder"], log_mel(wave_BS, span), span, config.semantic_model_config
    )
    x_BTD = encoder.semantic_adapter(params["semantic_adapter"], x_BTD, span)
    silent = jnp.zeros((*x_BTD.shape[:2], config.hidden_size))
    fused_BTD = linear(jnp.concatenate([x_BTD, silent], -1), params["fc_encoder"])
    return quantize(
        linear(fused_BTD, params["quantizer"]["project_in"]), tuple(config.quantization_levels)
    )


def write_model(params: dict, weights, folder: Path) -> None:
    """The parameters as a checkpoint of transformers' `Xcodec2Model`, in float16."""
    from safetensors.numpy import save_file

    # What is not trained, the semantic encoder's mask, stays as it was.
    tensors = {name: weights.read(name) for name in weights.names}
    for part, of_part in params.items():
        tensors |= weights.named(part, of_part)
    folder.mkdir(parents=True, exist_ok=True)
    halved = {name: tensor.astype(np.float16) for name, tensor in tensors.items()}
    save_file(halved, folder / "model.safetensors", {"format": "pt"})


def stft(wave_BS: jax.Array, size: int, hop: int) -> jax.Array:
    """Magnitudes [B, T, size / 2 + 1]."""
    count = (wave_BS.shape[1] - size) // hop + 1
    pieces = wave_BS.reshape(len(wave_BS), -1, hop)
    frames = jnp.concatenate([pieces[:, i : i + count] for i in range(size // hop)], -1)
    spectrum = jnp.fft.rfft(frames * np.hanning(size + 1)[:-1].astype(np.float32))
    return jnp.sqrt(spectrum.real**2 + spectrum.imag**2 + 1e-9)


def mel_bank(size: int, bands: int = 80) -> np.ndarray:
    """[size / 2 + 1, bands]: triangles on HTK's mel scale."""
    mel = np.linspace(0, 2595 * np.log10(1 + 8000 / 700), bands + 2)
    edges = 700 * (10 ** (mel / 2595) - 1)
    hertz = np.linspace(0, 8000, size // 2 + 1)[:, None]
    up = (hertz - edges[:-2]) / (edges[1:-1] - edges[:-2])
    down = (edges[2:] - hertz) / (edges[2:] - edges[1:-1])
    return np.maximum(0, np.minimum(up, down)).astype(np.float32)


def distance(ours_BS: jax.Array, theirs_BS: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The loss, and the part of it that is the mel spectrograms'."""
    total = 0.0
    for size, hop in SPECTRA:
        ours, theirs = stft(ours_BS, size, hop), stft(theirs_BS, size, hop)
        total += jnp.abs(jnp.log(ours + 1e-2) - jnp.log(theirs + 1e-2)).mean()
        total += jnp.linalg.norm(ours - theirs) / (jnp.linalg.norm(theirs) + 1e-3) / 2
    bank = mel_bank(1024)
    mel = jnp.abs(jnp.log(ours @ bank + 1e-2) - jnp.log(theirs @ bank + 1e-2)).mean()
    return total / len(SPECTRA) + 2 * mel, mel


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(".cache/train_codec"))
    parser.add_argument("--hours", type=float, default=0.8)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--evaluate", action="store_true")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if not (options.out / "start/config.json").exists():
        make_model(options.out / "start")
    config = json.loads((options.out / "start/config.json").read_text())
    weights = open_weights(str(options.out / "start"), config)
    if options.evaluate:
        evaluate(options.out)
        return
    waves = corpus(options.hours, options.out / "corpus.npy")
    params = {part: weights.part(part) for part in ("encoder", "decoder")}
    silent = params["encoder"].pop("acoustic_encoder")
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"{count / 1e6:.2f}M parameters, {len(waves) / SAMPLE_RATE / 3600:.2f} hours", flush=True)

    rate = optax.warmup_cosine_decay_schedule(
        0, options.learning_rate, min(100, options.steps // 10), options.steps, 1e-5
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(rate, b1=0.8, b2=0.98, weight_decay=1e-3)
    )
    full = np.full(CLIPS, FRAMES, np.int32)

    def loss_of(params, wave_BS):
        codes, values = encode(params["encoder"], wave_BS, full, weights.config)
        ours = decoder.decode_values(params["decoder"], values, full, weights.config)
        loss, mel = distance(ours, wave_BS)
        return loss, (mel, codes)

    @jax.jit
    def step(params, state, wave_BS):
        (loss, more), gradient = jax.value_and_grad(loss_of, has_aux=True)(params, wave_BS)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss, *more

    state, done, kept = optimizer.init(params), 0, options.out / "state.npz"
    leaves, structure = jax.tree.flatten((params, state))
    if kept.exists():
        saved = np.load(kept)
        done = int(saved["done"])
        params, state = structure.unflatten([saved[str(i)] for i in range(len(leaves))])
    log = (options.out / "metrics.jsonl").open("a")
    used: list[np.ndarray] = []
    losses: list[tuple] = []
    began = time.time()
    while done < options.steps:
        rng = np.random.default_rng([1, done])
        at = rng.integers(0, len(waves) - FRAMES * HOP, CLIPS)
        batch = np.stack([waves[i : i + FRAMES * HOP] for i in at]) / np.float32(1 << 15)
        params, state, loss, mel, codes = step(params, state, batch)
        losses.append((float(loss), float(mel)))
        used.append(np.asarray(codes).reshape(-1))
        done += 1
        if done % 50 == 0:
            loss, mel = np.mean(losses, 0)
            codes = np.concatenate(used)
            row = {"step": done, "loss": loss, "mel": mel, "seconds": time.time() - began}
            row["distinct_share"] = len(np.unique(codes)) / len(codes)
            log.write(json.dumps(row) + "\n")
            log.flush()
            print(json.dumps(row), flush=True)
            losses, used = [], []
        if done % SAVE_EVERY == 0 or done == options.steps:
            arrays = {str(i): np.asarray(x) for i, x in enumerate(jax.tree.leaves((params, state)))}
            np.savez(options.out / "new.npz", done=done, **arrays)
            (options.out / "new.npz").replace(kept)
            whole = params | {"encoder": params["encoder"] | {"acoustic_encoder": silent}}
            write_model(whole, weights, options.out / "codec")
            (options.out / "codec/config.json").write_text(json.dumps(config, indent=2) + "\n")


def heard(decoder, wave: np.ndarray) -> list[str]:
    """The words that pocketsphinx understands."""
    decoder.start_utt()
    decoder.process_raw((wave * 32767).astype(np.int16).tobytes(), full_utt=True)
    decoder.end_utt()
    found = decoder.hyp()
    return found.hypstr.split() if found else []


def evaluate(out: Path) -> None:
    import jiwer
    from pocketsphinx import Decoder

    from llasa_jax.codec import load_codec

    codec = load_codec(str(out / "codec"))
    listener = Decoder(samprate=SAMPLE_RATE, loglevel="FATAL")
    rng = np.random.default_rng(99)
    codes = []
    for voice in VOICES:
        said, before, after = [], [], []
        for _ in range(20):
            said.append(" ".join(rng.choice(NUMBERS[:10], 6)))
            wave = speak(said[-1], voice).astype(np.float32) / (1 << 15)
            codes.append(codec.encode([wave])[0])
            before.append(" ".join(heard(listener, wave)))
            after.append(" ".join(heard(listener, codec.decode(codes[-1]))))
        print(
            f"{voice}: word errors in digits {jiwer.wer(said, before):.1%},"
            f" through the codec {jiwer.wer(said, after):.1%}",
            flush=True,
        )
        soundfile.write(out / f"{voice}.wav", codec.decode(codes[-1]), SAMPLE_RATE)
    codes = np.concatenate(codes)
    print(f"{len(np.unique(codes))} different codes among {len(codes)}")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
