"""Audio read and resampled in processes of their own, which may be slow, stall or die without
encoding or training doing so.
"""

import contextlib
import math
import multiprocessing
import signal
import sys
from collections import Counter, deque
from collections.abc import Sequence
from multiprocessing.connection import wait
from time import monotonic
from typing import Any
from unittest import mock

import numpy as np

from llasa_jax.data.bad_list import reason_of
from llasa_jax.encode.audio_source import AudioSource, Waves
from llasa_jax.errors import UserError
from llasa_jax.speech.audio import SAMPLE_RATE

CHANCES = 3  # how many processes may die of one clip
STARTS = 10  # how many processes in a row may die as they start
Key = tuple[int, int]  # a source and the clip's index in it


class Readers:
    """`count` processes that read clips of `sources`. One that dies is replaced, and its clip read
    again by another.

    They are given a clip once they have started, so that one that dies before is no clip's fault.
    Spawned, not forked: a fork of a process that runs JAX may hang. They leave signals to the
    trainer, which kills them with `close`, and end by themselves when it is gone. Clips of more
    than `max_seconds` are refused.
    """

    def __init__(self, sources: Sequence[AudioSource], count: int, max_seconds: float = math.inf):
        self._sources, self._waves = sources, [source.waves() for source in sources]
        self._context = multiprocessing.get_context("spawn")
        self._max_seconds = max_seconds
        self._todo: deque[Key] = deque()
        self._deaths: Counter[Key] = Counter()
        self._in_vain = 0  # processes that died as they started since one did not
        self._idle: list = []  # processes, each after its pipe
        # a process's pipe -> what it reads (None while it starts), since when, and the process
        self._busy: dict = {}
        self._closed = False
        for _ in range(count):
            self._start()

    def submit(self, key: Key) -> None:
        """Asks for a clip, after all that were asked for before."""
        self._todo.append(key)
        self._hand_out()

    def receive(self, timeout: float) -> list[tuple[Key, np.ndarray | None, str]]:
        """Clips that are read, in any order: (key, wave, "") or (key, None, why it cannot be used).
        Waits `timeout` seconds at most.
        """
        results: list[tuple[Key, np.ndarray | None, str]] = []
        ready: list[Any] = wait(list(self._busy), timeout) if self._busy else []
        for pipe in ready:
            key, _, process = self._busy.pop(pipe)
            try:
                wave, reason = pipe.recv()
            except (EOFError, OSError):
                if self._closed:
                    return results
                results += self._died(key, process)
                continue
            self._idle.append((pipe, process))
            if key is None:
                self._in_vain = 0
            else:
                del self._deaths[key]
                results.append((key, wave, reason))
        self._hand_out()
        return results

    def slowest(self) -> tuple[Key, float] | None:
        """The clip that is being read the longest, and for how many seconds; None if nothing is."""
        reading = [(since, key) for key, since, _ in list(self._busy.values()) if key is not None]
        if not reading:
            return None
        since, key = min(reading)
        return key, monotonic() - since

    def close(self) -> None:
        self._closed = True
        for process in [process for _, process in self._idle] + [
            process for *_, process in list(self._busy.values())
        ]:
            process.kill()

    def _start(self) -> None:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(
            target=_read,
            args=(self._waves, theirs, self._max_seconds),
            daemon=True,
            name="llasa-jax reader",
        )
        with without_main():
            process.start()
        theirs.close()  # or the process's end would go unnoticed
        self._busy[ours] = None, monotonic(), process

    def _hand_out(self) -> None:
        while self._todo and self._idle and not self._closed:
            pipe, process = self._idle.pop()
            try:
                number, index = self._todo[0]
                pipe.send((number, self._sources[number].place(index)))
            except OSError:
                self._replace(process)
                continue
            self._busy[pipe] = self._todo.popleft(), monotonic(), process

    def _died(self, key: Key | None, process) -> list[tuple[Key, None, str]]:
        code = self._replace(process)
        if key is None:
            self._in_vain += 1
            if self._in_vain >= STARTS:
                raise RuntimeError(
                    f"{STARTS} processes that read audio died as they started, the last with exit"
                    f" code {code}"
                )
            return []
        self._deaths[key] += 1
        if self._deaths[key] < CHANCES:
            self._todo.appendleft(key)
            return []
        return [
            (key, None, f"{CHANCES} processes that read it died, the last with exit code {code}")
        ]

    def _replace(self, process) -> int | None:
        process.join(1)
        self._start()
        return process.exitcode


@contextlib.contextmanager
def without_main():
    """Keeps multiprocessing from running the main program once more in the process that it starts:
    readers need nothing of it, and a plain script has no `if __name__ == "__main__"`.
    """
    main = sys.modules["__main__"]
    with mock.patch.multiple(main, create=True, __spec__=None, __file__=None):
        yield


def _read(sources: Sequence[Waves], pipe, max_seconds: float) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    result: tuple[np.ndarray | None, str] = None, ""  # the first thing that is sent: it has started
    while True:
        try:
            pipe.send(result)
            source, place = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            result = _checked(_wave(sources[source], place, max_seconds)), ""
        except Exception as error:  # noqa: BLE001 decoders raise kinds of their own
            result = None, reason_of(error)


def _wave(source: Waves, place: Any, max_seconds: float) -> np.ndarray:
    wave = source.wave(place)
    if len(wave) > max_seconds * SAMPLE_RATE:
        raise UserError(
            f"{source.where(place)}: {len(wave) / SAMPLE_RATE:.0f} s long, and the codec's memory"
            " grows with the square of that; cut it, or raise max_clip_seconds (it is"
            f" {max_seconds:g})."
        )
    return wave


def _checked(wave: np.ndarray) -> np.ndarray:
    wave = np.asarray(wave, np.float32)
    if wave.ndim != 1 or not wave.size or not np.isfinite(wave).all():
        raise UserError(
            f"the wave, of shape {wave.shape}, is not a channel of finite samples; export it again"
            " from its source"
        )
    return wave
