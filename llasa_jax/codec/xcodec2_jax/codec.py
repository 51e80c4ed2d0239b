"""XCodec2 in JAX behind the codec's interface.

Any clips go through arrays of a few fixed shapes, divided over all devices.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llasa_jax.codec.interface import HOP
from llasa_jax.codec.streaming import stream
from llasa_jax.codec.xcodec2 import check_codes, check_waves
from llasa_jax.codec.xcodec2_jax.decoder import decode
from llasa_jax.codec.xcodec2_jax.encoder import encode
from llasa_jax.codec.xcodec2_jax.weights import Weights
from llasa_jax.errors import UserError
from llasa_jax.speech.audio import SAMPLE_RATE

# How a TPU multiplies float32 numbers: in six passes over bfloat16 parts, in three, or in bfloat16.
Precision = Literal["float32", "bfloat16_3x", "bfloat16"]
JAX_PRECISION = {"float32": "float32", "bfloat16_3x": "high", "bfloat16": "bfloat16"}
BATCH_FRAMES = 16 * 512  # of a device at a time: 16 clips of 10 s
_SHORTEST = 64


class JaxCodec:
    """XCodec2 in JAX as a `Codec`: the codes, and up to round-off the waves, of `Xcodec2Codec`.

    Clips are prepared as `Xcodec2Codec` does it, then padded to one of a few lengths and batched; a
    clip's codes depend neither on its neighbours nor on the padding (up to round-off in the matrix
    products, which can flip a value lying on a rounding edge). A batch is divided over `devices`,
    by default all of this process; several processes each encode their own clips. The weights of
    the encoder and of the decoder are loaded when they are first needed.
    """

    sample_rate = SAMPLE_RATE
    hop = HOP

    def __init__(
        self,
        name: str,
        weights: Weights,
        devices: Sequence[jax.Device] | None = None,
        precision: Precision = "float32",
    ):
        if precision not in get_args(Precision):
            raise UserError(
                f"codec precision {precision!r} is unknown; use {', '.join(get_args(Precision))}."
            )
        self.name, self.fingerprint = name, weights.fingerprint
        self.precision = precision
        self._weights = weights
        self.lengths_an_octave = 2  # more: less padding, more programs to compile
        self._mesh = Mesh(np.array(devices or jax.local_devices()), ("clips",))

    def padded_frames(self, frames: int) -> int:
        """The length that a clip of `frames` is padded to."""
        return padded_frames(frames, self.lengths_an_octave)

    def encode(self, waves: list[np.ndarray]) -> list[np.ndarray]:
        """Waves, float32 (samples,) at 16 kHz, to codes, uint16 (samples // 320 + 1,), in order.

        Raises `UserError` for an empty wave, more than one channel, and NaN or infinite samples.
        """
        check_waves(waves)
        padded = [np.pad(wave.astype(np.float32), (0, HOP - len(wave) % HOP)) for wave in waves]
        codes = self._batched(lambda *batch: self._encode(self._encoder, *batch), padded, HOP, 1)
        return [row.astype(np.uint16) for row in codes]

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Codes, integers (frames,), to the wave, float32 (frames * 320,) at 16 kHz.

        Raises `UserError` for no codes, and for a code outside 0..65535 (token ids are code + the
        tokenizer's base).
        """
        return self.decode_batch([codes])[0]

    def decode_batch(self, codes: list[np.ndarray]) -> list[np.ndarray]:
        """As `decode`, many clips at a time."""
        checked = [check_codes(clip).astype(np.int32) for clip in codes]
        return self._batched(lambda *batch: self._decode(self._decoder, *batch), checked, 1, HOP)

    def stream(self, codes: Iterable[np.ndarray], **sizes: int) -> Iterator[np.ndarray]:
        """Codes as they come to pieces of the wave; see `Stream` for `sizes`."""
        return stream(self.decode, codes, **sizes)

    def compile(self, part: str, rows: int, seconds: float) -> jax.stages.Compiled:
        """The program of "encoder" or "decoder" for `rows` clips of `seconds` on each device."""
        dtype = jnp.bfloat16 if self.precision == "bfloat16" else np.float32
        frames = self.padded_frames(round(seconds * SAMPLE_RATE) // HOP)
        rows *= self._mesh.size
        run, clips = (
            (self._encode, ((rows, frames * HOP), np.float32))
            if part == "encoder"
            else (self._decode, ((rows, frames), np.int32))
        )
        everywhere, divided = (
            NamedSharding(self._mesh, PartitionSpec(*axes)) for axes in ((), ("clips",))
        )
        weights = jax.tree.map(
            lambda array: jax.ShapeDtypeStruct(array.shape, dtype, sharding=everywhere),
            self._weights.part(part),
        )
        batch = (
            jax.ShapeDtypeStruct(shape, kind, sharding=divided)
            for shape, kind in (clips, ((rows,), np.int32))
        )
        return jax.jit(run).lower(weights, *batch).compile()

    @cached_property
    def _encoder(self) -> dict:
        return self._on_devices("encoder")

    @cached_property
    def _decoder(self) -> dict:
        return self._on_devices("decoder")

    def _on_devices(self, part: str) -> dict:
        dtype = jnp.bfloat16 if self.precision == "bfloat16" else np.float32
        return jax.device_put(
            self._weights.part(part, dtype), NamedSharding(self._mesh, PartitionSpec())
        )

    @cached_property
    def _encode(self) -> Callable:
        return self._compiled(
            lambda params, waves, frames: encode(params, waves, frames, self._weights.config)[0]
        )

    @cached_property
    def _decode(self) -> Callable:
        return self._compiled(
            lambda params, codes, frames: decode(params, codes, frames, self._weights.config)
        )

    def _compiled(self, function: Callable) -> Callable:
        """`function` of parameters and a batch; each device has its own clips."""
        clips = PartitionSpec("clips")
        sharded = jax.jit(
            jax.shard_map(
                function,
                mesh=self._mesh,
                in_specs=(PartitionSpec(), clips, clips),
                out_specs=clips,
                check_vma=False,
            )
        )

        def run(*arguments):
            with jax.default_matmul_precision(JAX_PRECISION[self.precision]):
                return sharded(*arguments)

        return run

    def _batched(
        self, run: Callable, clips: list[np.ndarray], steps_in: int, steps_out: int
    ) -> list[np.ndarray]:
        """`run` over clips in batches of one padded length.

        A clip has `steps_in` values a frame, its result `steps_out`.
        """
        of_length = defaultdict(list)
        for index, clip in enumerate(clips):
            of_length[self.padded_frames(len(clip) // steps_in)].append(index)
        results: dict[int, np.ndarray] = {}
        sharding = NamedSharding(self._mesh, PartitionSpec("clips"))
        for length, indices in of_length.items():
            start = 0
            while start < len(indices):
                rows = self._rows(len(indices) - start, length)
                batch = indices[start : start + rows]
                start += rows
                array = np.zeros((rows, length * steps_in), clips[batch[0]].dtype)
                frames = np.ones(rows, np.int32)
                for row, index in enumerate(batch):
                    array[row, : len(clips[index])] = clips[index]
                    frames[row] = len(clips[index]) // steps_in
                # Copied: what JAX gives is read-only, and callers may change their waves.
                output = np.array(run(*jax.device_put((array, frames), sharding)))
                for row, index in enumerate(batch):
                    results[index] = output[row, : frames[row] * steps_out]
        return [results[index] for index in range(len(clips))]

    def _rows(self, clips: int, length: int) -> int:
        """How many of so many waiting clips go together: few numbers, as each is compiled."""
        devices, a_device = self._mesh.size, 1
        while 4 * a_device * length <= BATCH_FRAMES and 4 * a_device * devices <= clips:
            a_device *= 4
        return a_device * devices


def padded_frames(frames: int, lengths_an_octave: int = 2) -> int:
    """The length that a clip of `frames` is padded to: so many an octave for long clips."""
    octave = _SHORTEST
    while octave < frames:
        octave *= 2
    if octave <= 4 * _SHORTEST and lengths_an_octave == 2:
        return octave
    step = max(_SHORTEST // 8, octave // (2 * lengths_an_octave))
    return -(-frames // step) * step
