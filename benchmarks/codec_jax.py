"""XCodec2 in JAX against transformers' in PyTorch, at full size: `python benchmarks/codec_jax.py`.

The full-size model (629M parameters) gets random weights, since no test may depend on a download.
Both encode the corpus of real speech, then text read by flite's four voices (Debian's package
flite) and the corpus played slower, cut to clips of one length; then both decode the codes. Each
side has the same number of threads, and JAX has compiled its programs before. Seconds of processor
time are printed beside the clock's: on a machine that does other work at the same time they are the
fairer ones. A code that differs is printed with its distance to the edge between two codes.

`--gpu` runs both on one GPU, each with half of its memory.

`--precision` also counts how many codes change where each float32 product is made of three passes
over bfloat16 parts, as a TPU makes it on request, or of one, and where the weights are bfloat16.
`--stream` measures how far streaming is from decoding whole.
"""

import argparse
import contextlib
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parents[1] / "tests/fixtures"))

TEXT = """The north wind and the sun were disputing which was the stronger, when a traveller came
along wrapped in a warm cloak. They agreed that the one who first succeeded in making the traveller
take his cloak off should be considered stronger than the other. Then the north wind blew as hard as
he could, but the more he blew, the more closely did the traveller fold his cloak around him."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--clips", type=int, default=16)
    parser.add_argument("--frames", type=int, default=384, help="of a clip, of 20 ms each")
    parser.add_argument("--torch-batch", type=int, default=16, help="clips in a PyTorch batch")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", action="store_true")
    parser.add_argument("--stream", action="store_true")
    parser.add_argument("--gpu", action="store_true")
    options = parser.parse_args()
    device = "cuda" if options.gpu else "cpu"
    os.environ |= {"JAX_PLATFORMS": device, "NPROC": str(options.threads)}
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")

    import jax
    import numpy as np
    import torch
    import transformers

    from llasa_jax.codec import load_codec
    from llasa_jax.codec.xcodec2_jax import JaxCodec
    from llasa_jax.codec.xcodec2_jax.weights import open_weights

    torch.set_num_threads(options.threads)
    print(
        f"{time.strftime('%Y-%m-%d')}; {os.cpu_count()}-core {platform.machine()}, load"
        f" {os.getloadavg()[0]:.1f}; {jax.devices()[0].device_kind}; jax {jax.__version__}, torch"
        f" {torch.__version__}, transformers {transformers.__version__}"
    )
    clips = speech(options.frames)[: options.clips]
    frames = len(clips) * options.frames
    print(f"{len(clips)} clips, {frames} frames, {frames / 50:.0f} s of speech", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        config = make_model(folder)
        theirs = load_codec(folder, device)
        ours = JaxCodec("jax", open_weights(folder, config))
        assert theirs.fingerprint == ours.fingerprint

        seconds("jax, first batches: compiling too", frames, lambda: ours.encode(clips))
        codes, jax_encode = seconds("jax encodes", frames, lambda: ours.encode(clips))
        bounded = []
        hook = theirs.model.quantizer.quantizer.register_forward_pre_hook(
            lambda quantizer, inputs: bounded.append(quantizer.bound(inputs[0]).cpu().numpy())
        )
        batches = [
            clips[i : i + options.torch_batch] for i in range(0, len(clips), options.torch_batch)
        ]
        expected, torch_encode = seconds(
            "torch encodes",
            frames,
            lambda: [row for batch in batches for row in theirs.encode(batch)],
        )
        hook.remove()
        equal = sum(int((a == b).sum()) for a, b in zip(codes, expected, strict=True))
        print(f"equal codes: {equal} of {frames}")
        values = np.concatenate([row for batch in bounded for row in batch])
        different = np.concatenate(codes) != np.concatenate(expected)
        edge = np.abs(np.abs(values - np.floor(values)) - 0.5).min(-1)
        for distance in edge[different]:
            print(f"  one that differs lies {distance:.1e} from the edge")
        print(f"of all values, the nearest to an edge: {np.sort(edge)[:3]}")

        seconds("jax, first batches: compiling too", frames, lambda: ours.decode_batch(expected))
        waves, jax_decode = seconds("jax decodes", frames, lambda: ours.decode_batch(expected))
        array = torch.from_numpy(np.stack(expected).astype(np.int64))[:, None].to(device)
        with torch.inference_mode():
            reference, torch_decode = seconds(
                "torch decodes",
                frames,
                lambda: torch.cat(
                    [theirs._wave(part) for part in array.split(options.torch_batch)]
                ).cpu(),
            )
        reference = reference[:, 0].numpy()
        error, loudest = np.abs(np.stack(waves) - reference).max(), np.abs(reference).max()
        print(f"waves differ by {error:.1e}; the loudest sample is {loudest:.2f}")
        for what, mine, other in (
            ("encoding", jax_encode, torch_encode),
            ("decoding", jax_decode, torch_decode),
        ):
            by_clock, by_processor = other[0] / mine[0], other[1] / mine[1]
            print(f"{what}: jax is {by_clock:.2f}x as fast by the clock,", end=" ")
            print(f"{by_processor:.2f}x by processor time")
        if options.precision:
            changed_codes(folder, config, clips[:4], expected[:4])
        if options.stream:
            streamed(ours, np.concatenate(expected[:4]))


def speech(frames: int) -> list:
    """Clips of one length: the tests' corpus, flite's voices, the corpus at nine tenths speed."""
    import numpy as np
    import soxr

    from llasa_jax.speech.audio import SAMPLE_RATE, read_audio

    files = sorted((Path(__file__).parents[1] / "tests/speech").glob("*.flac"))
    corpus = np.concatenate([read_audio(file) for file in files])
    slower = soxr.resample(corpus, 0.9 * SAMPLE_RATE, SAMPLE_RATE).astype(np.float32)
    wave, length = np.concatenate([corpus, *voices(), slower]), frames * 320
    return [wave[i : i + length - 1] for i in range(0, len(wave) - length, length)]


def voices() -> list:
    """A text read by each of flite's voices; none where flite is not installed."""
    from llasa_jax.speech.audio import read_audio

    if shutil.which("flite") is None:
        return []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "voice.wav"
        waves = []
        for voice in ("slt", "rms", "awb", "kal16"):
            subprocess.run(["flite", "-voice", voice, "-t", TEXT, "-o", file], check=True)
            waves.append(read_audio(file))
    return waves


def make_model(folder: str) -> dict:
    """Saves a full-size model with seeded random weights, and returns its config as JSON has it."""
    import json

    from small_codec import randomise
    from transformers import Xcodec2Config, Xcodec2Model
    from transformers.initialization import no_init_weights
    from transformers.utils import logging

    logging.disable_progress_bar()
    with no_init_weights():
        model = Xcodec2Model(Xcodec2Config())
    print(
        f"{sum(weight.numel() for weight in model.parameters()) / 1e6:.0f}M parameters", flush=True
    )
    randomise(model)
    model.save_pretrained(folder)
    return json.loads((Path(folder) / "config.json").read_text())


def seconds(what: str, frames: int, run: Callable) -> tuple:
    """What `run` returns, and its seconds by the clock and of processor time."""

    def processor() -> float:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return usage.ru_utime + usage.ru_stime

    clock, used = time.perf_counter(), processor()
    result = run()
    clock, used = time.perf_counter() - clock, processor() - used
    print(f"{what}: {clock:.1f} s, {used:.1f} s of processor time", end="; ")
    print(f"{frames / 50 / clock:.2f}x real time", flush=True)
    return result, (clock, used)


@contextlib.contextmanager
def emulated(passes: int):
    """Float32 products as a TPU makes them of bfloat16 parts, in the codec's shared layers."""
    from jax import lax

    from llasa_jax.codec.xcodec2_jax import layers

    numpy, primitive = layers.jnp, layers.lax

    def parts(x):
        high = lax.reduce_precision(x, 8, 7)
        return [high, lax.reduce_precision(x - high, 8, 7)][: 2 if passes == 3 else 1]

    def product(multiply, a, b):
        a, b = parts(a), parts(b)
        pairs = [(i, j) for i in range(len(a)) for j in range(len(b)) if i + j < len(a)]
        return sum(multiply(a[i], b[j]) for i, j in sorted(pairs, key=sum, reverse=True))

    def einsum(letters, a, b):
        return product(lambda x, y: numpy.einsum(letters, x, y), a, b)

    def convolution(a, b, *rest, **more):
        return product(lambda x, y: primitive.conv_general_dilated(x, y, *rest, **more), a, b)

    layers.jnp = SimpleNamespace(**{**vars(numpy), "einsum": einsum})
    layers.lax = SimpleNamespace(**{**vars(primitive), "conv_general_dilated": convolution})
    try:
        yield
    finally:
        layers.jnp, layers.lax = numpy, primitive


def changed_codes(folder: str, config: dict, clips: list, expected: list) -> None:
    import numpy as np

    from llasa_jax.codec.xcodec2_jax import JaxCodec
    from llasa_jax.codec.xcodec2_jax.weights import open_weights

    weights = open_weights(folder, config)
    for what, passes, precision in (
        ("three passes", 3, "float32"),
        ("one pass", 1, "float32"),
        ("bfloat16", 0, "bfloat16"),
    ):
        codec = JaxCodec("jax", weights, precision=precision)
        with emulated(passes) if passes else contextlib.nullcontext():
            codes = codec.encode(clips)
        different = np.concatenate(codes) != np.concatenate(expected)
        print(
            f"{what}: {different.sum()} of {different.size} codes change, {different.mean():.2%}",
            flush=True,
        )


def streamed(codec, codes) -> None:
    import numpy as np

    whole = codec.decode(codes)
    for context, look_ahead in ((50, 10), (150, 25), (300, 50)):
        pieces = list(codec.stream(iter(codes[:, None]), context=context, look_ahead=look_ahead))
        error = np.concatenate(pieces) - whole
        ratio = 10 * np.log10(np.square(whole).mean() / np.square(error).mean())
        print(f"streaming, context {context}, look-ahead {look_ahead}:", end=" ")
        print(f"{ratio:.1f} dB above the error", flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
