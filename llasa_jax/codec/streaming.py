"""Decoding speech while its codes still come, in bounded memory."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from llasa_jax.codec.interface import HOP


class Stream:
    """Codes in pieces of any size to the wave in chunks of `chunk` frames; the last may be shorter.

    A chunk comes as soon as `look_ahead` codes after it are there, and is cut from what `decode`
    makes of it with up to `context` codes before it and `look_ahead` after it (all in frames of
    20 ms). XCodec2's decoder attends to all codes that it gets, so this is the wave of the whole
    speech as far as `context` and `look_ahead` hold what matters; where one window holds all, it is
    that wave. Neighbouring chunks are blended over one frame, since their windows differ. `prompt`
    are codes before the first, whose wave is left out.
    """

    def __init__(
        self,
        decode: Callable[[np.ndarray], np.ndarray],
        chunk: int = 50,
        context: int = 150,
        look_ahead: int = 25,
        prompt: Sequence[int] | np.ndarray = (),
    ):
        self._decode, self._chunk, self._context = decode, chunk, context
        self._look_ahead = look_ahead
        # From `context` codes before the next chunk on, and how many of them are before it.
        self._pending = np.asarray(prompt, np.int64)[max(0, len(prompt) - context) :]
        self._before = len(self._pending)
        self._tail: np.ndarray | None = None  # the last chunk's opinion of the next one's frame

    def feed(self, codes: np.ndarray) -> Iterator[np.ndarray]:
        """The chunks that come with these codes, float32 (chunk * 320,)."""
        self._pending = np.concatenate([self._pending, np.asarray(codes, np.int64)])
        while len(self._pending) >= self._before + self._chunk + max(1, self._look_ahead):
            yield self._cut(self._chunk)

    def end(self) -> Iterator[np.ndarray]:
        """The chunks that are left when no more codes come."""
        while (left := len(self._pending) - self._before) > 0:
            yield self._cut(min(self._chunk, left))

    def _cut(self, frames: int) -> np.ndarray:
        window = self._pending[: self._before + self._chunk + self._look_ahead]
        wave = self._decode(window)[self._before * HOP :]
        piece, rest = wave[: frames * HOP], wave[frames * HOP : (frames + 1) * HOP]
        if self._tail is not None:
            fade = (np.arange(HOP, dtype=np.float32) + 0.5) / HOP
            piece[:HOP] = self._tail * (1 - fade) + piece[:HOP] * fade
        self._tail = rest if len(rest) else None
        drop = max(0, self._before + frames - self._context)
        self._pending, self._before = self._pending[drop:], self._before + frames - drop
        return piece


def stream(
    decode: Callable[[np.ndarray], np.ndarray], codes: Iterable[np.ndarray], **sizes: Any
) -> Iterator[np.ndarray]:
    """`Stream` over codes as they come."""
    whole = Stream(decode, **sizes)
    for piece in codes:
        yield from whole.feed(piece)
    yield from whole.end()
