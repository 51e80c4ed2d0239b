"""Decoding speech while its codes still come, in bounded memory."""

from collections.abc import Callable, Iterable, Iterator

import numpy as np

from llasa_jax.codec.interface import HOP


def stream(
    decode: Callable[[np.ndarray], np.ndarray],
    codes: Iterable[np.ndarray],
    chunk: int = 50,
    context: int = 150,
    look_ahead: int = 25,
) -> Iterator[np.ndarray]:
    """Codes in pieces of any size to the wave in chunks of `chunk` frames; the last may be shorter.

    A chunk comes as soon as `look_ahead` codes after it are there, and is cut from what `decode`
    makes of it with up to `context` codes before it and `look_ahead` after it (all in frames of
    20 ms). XCodec2's decoder attends to all codes that it gets, so this is the wave of the whole
    speech as far as `context` and `look_ahead` hold what matters; where one window holds all, it is
    that wave. Neighbouring chunks are blended over one frame, since their windows differ.
    """
    pending = np.zeros(0, np.int64)  # from `context` codes before the next chunk on
    before = 0  # how many of them are before it
    tail = None  # the last chunk's opinion of the next chunk's first frame

    def cut(window: np.ndarray, frames: int) -> np.ndarray:
        nonlocal tail
        wave = decode(window)[before * HOP :]
        piece, rest = wave[: frames * HOP], wave[frames * HOP : (frames + 1) * HOP]
        if tail is not None:
            fade = (np.arange(HOP, dtype=np.float32) + 0.5) / HOP
            piece[:HOP] = tail * (1 - fade) + piece[:HOP] * fade
        tail = rest if len(rest) else None
        return piece

    for piece in codes:
        pending = np.concatenate([pending, np.asarray(piece)])
        while len(pending) >= before + chunk + max(1, look_ahead):
            yield cut(pending[: before + chunk + look_ahead], chunk)
            drop = max(0, before + chunk - context)
            pending, before = pending[drop:], before + chunk - drop
    while len(pending) > before:
        frames = min(chunk, len(pending) - before)
        yield cut(pending[: before + chunk + look_ahead], frames)
        drop = max(0, before + frames - context)
        pending, before = pending[drop:], before + frames - drop
