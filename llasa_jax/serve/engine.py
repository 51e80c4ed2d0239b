"""The thread that owns the model: requests join its batch as rows are free, and leave it when they
are done, late, or nobody listens any more.

Codes become sound in two more threads, one for streams, which wait for nothing longer than a chunk,
and one for whole speeches.
"""

import queue
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from llasa_jax.errors import UserError, first_line
from llasa_jax.generate.continuous import Batch
from llasa_jax.generate.line import NO_VOICE, Line, Recording, Speech
from llasa_jax.generate.sampling import SamplingSettings
from llasa_jax.generate.settings import SpeechSettings
from llasa_jax.generate.sound import CHUNK, SoundStream
from llasa_jax.generate.speaker import Said, Speaker
from llasa_jax.serve.metrics import Metrics

# Codes between two looks at the requests: half a chunk, so that none waits long for its turn.
STEP = CHUNK // 2

# What a request is given: waves, float32 (samples,), at last a Speech, or an error instead.
Give = Callable[[np.ndarray | Speech | Exception], None]


class Busy(Exception):
    """The queue is full."""


class Late(Exception):
    """The request took longer than is allowed."""


class Request:
    """A line that is spoken with a seed. `give` gets its waves (one, or with `streams` many), then
    its `Speech`, or an error; it is called from other threads.
    """

    def __init__(self, line: Line, seed: int, streams: bool, give: Give):
        self.line, self.seed, self.streams, self._give = line, seed, streams, give
        self.came = time.monotonic()
        self.is_dropped = False
        self._is_silent = True
        self.sound: SoundStream  # of a stream, once it is spoken

    def give(self, item: np.ndarray | Speech | Exception, metrics: Metrics) -> None:
        """Hands `item` on, unless nobody listens any more."""
        if self.is_dropped:
            return
        seconds = time.monotonic() - self.came
        if isinstance(item, np.ndarray):
            if self._is_silent:
                metrics.first_audio.observe(seconds)
            self._is_silent = False
            metrics.audio_seconds.inc(len(item) / 16_000)
        else:
            metrics.seconds.observe(seconds)
        self._give(item)


class Swap:
    """Weights that the engine is to go on with, whether it does, and the only request that is to be
    spoken with them, if it is only one.
    """

    def __init__(self, params: dict, only: Request | None):
        self.params, self.only, self.done = params, only, threading.Event()


class Engine:
    """Speaks requests with `speaker`, all with the same settings, each with its own seed: what
    `speaker.speak` says of its line with that seed, whatever is spoken beside it.
    """

    def __init__(
        self,
        speaker: Speaker,
        sampling: SamplingSettings,
        settings: SpeechSettings,
        metrics: Metrics,
        *,
        max_queue: int = 64,
        max_seconds: float = 300.0,
    ):
        self.speaker, self._sampling, self._settings = speaker, sampling, settings
        self._metrics, self._max_queue, self._max_seconds = metrics, max_queue, max_seconds
        self._changed = threading.Condition()
        self._waiting: deque[Request] = deque()
        self._speaking: set[Request] = set()
        self._next: Swap | None = None
        self._only: Request | None = None
        self._loading = threading.Lock()
        self._closed = False
        self.failure: BaseException | None = None
        self._streams, self._wholes = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        metrics.waiting.set_function(lambda: len(self._waiting))
        metrics.running.set_function(lambda: len(self._speaking))
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Queues a request. Raises Busy where too many wait already."""
        with self._changed:
            if self.failure or self._closed:
                raise RuntimeError("the engine has ended")
            if len(self._waiting) >= self._max_queue + self.speaker.rows - len(self._speaking):
                raise Busy
            self._waiting.append(request)
            self._changed.notify()

    def say(self, line: Line, seed: int, step: int | None = None) -> Speech:
        """Waits for the whole speech of a line, with the weights of another checkpoint of the run
        where `step` names one; other requests wait meanwhile, and go on with those before. Raises
        as `submit` and `load`, and what goes wrong.
        """
        given: queue.Queue = queue.Queue()
        request = Request(line, seed, False, given.put)
        if step is None:
            return self._whole(request, given)
        with self._loading:
            before = self.speaker.params
            self._swap(self.speaker.weights(step), request)
            try:
                return self._whole(request, given)
            finally:
                self._swap(before)

    def _whole(self, request: Request, given: queue.Queue) -> Speech:
        self.submit(request)
        while not isinstance(item := given.get(), Speech):
            if isinstance(item, Exception):
                raise item
        return item

    def load(self, step: int) -> None:
        """Speaks with the weights of another checkpoint of the run from then on, and waits for
        that. Requests that are spoken end first, with the weights that they began with; others wait
        meanwhile. Where it fails, the weights stay. UserError where there is no such checkpoint.
        """
        with self._loading:
            self._swap(self.speaker.weights(step))

    def _swap(self, params: dict, only: Request | None = None) -> None:
        swap = Swap(params, only)
        with self._changed:
            self._next = swap
            self._changed.notify()
        while not swap.done.wait(1.0):
            if self.failure or self._closed:
                raise RuntimeError("the engine has ended")

    def drop(self, request: Request) -> None:
        """Nobody listens to `request` any more: its row is free at the next look."""
        with self._changed:
            request.is_dropped = True
            self._changed.notify()

    def close(self) -> None:
        """Ends the thread; what is not spoken is given an error."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()
        for pool in (self._streams, self._wholes):
            pool.shutdown()

    def _run(self) -> None:
        try:
            batch = self._new_batch()
            while self._wait():
                if self._next and not self._speaking:
                    self.speaker.use(self._next.params)
                    batch = self._new_batch()
                    self._only = self._next.only
                    self._next.done.set()
                    self._next = None
                try:
                    self._step(batch)
                except UserError as error:  # scores that are not finite: of which row is not known
                    self._fail(error)
                    batch = self._new_batch()
            self._fail(RuntimeError("the server is shutting down"))
        except BaseException as error:
            traceback.print_exc()
            self.failure = error
            self._fail(RuntimeError(f"the engine has failed ({first_line(error)})"))

    def _new_batch(self) -> Batch:
        speaker = self.speaker
        return Batch(speaker.rows_for(self._sampling, self._settings, speaker.rows))

    def _wait(self) -> bool:
        """Waits until there is something to do. False once the engine is to end."""
        with self._changed:
            while not (self._closed or self._next or self._waiting or self._speaking):
                self._changed.wait()
            return not self._closed

    def _step(self, batch: Batch) -> None:
        now = time.monotonic()
        with self._changed:
            late = [
                r for r in (*self._waiting, *self._speaking) if now - r.came > self._max_seconds
            ]
            gone = {r for r in (*self._waiting, *self._speaking, *late) if r.is_dropped} | {*late}
            self._waiting = deque(r for r in self._waiting if r not in gone)
            free = batch.rows.count - len(batch) + len(self._speaking & gone)
            free = 0 if self._next else free
            may = [r for r in self._waiting if self._only in (None, r)]
            new = may[:free]
            self._waiting = deque(r for r in self._waiting if r not in new)
        for request in gone & self._speaking:
            batch.drop(request)
        self._speaking -= gone
        for request in late:
            request.give(Late(), self._metrics)
        for request in new:
            self._begin(batch, request)
        before = time.monotonic()
        for request, result in batch.step(STEP):
            self._speaking.discard(request)
            if isinstance(result, Exception):
                request.give(result, self._metrics)
            elif request.streams:
                self._streams.submit(self._end_stream, request, result)
            else:
                self._wholes.submit(self._sound, request, result)
        self._metrics.step_seconds.observe(time.monotonic() - before)

    def _begin(self, batch: Batch, request: Request) -> None:
        hear = self._metrics.count_codes
        if request.streams:
            voice = request.line.prompt_audio
            prompt = voice if isinstance(voice, Recording) else NO_VOICE
            tail = self._settings.tail_seconds
            request.sound = SoundStream(self.speaker.codec, prompt.codes, tail)

            def hear(codes: np.ndarray) -> None:
                self._metrics.count_codes(codes)
                self._streams.submit(self._feed, request, codes)

        try:
            job = self.speaker.job(0, request.line, self._settings, request.seed)
            batch.add(request, job, hear)
            self._speaking.add(request)
        except UserError as error:
            request.give(error, self._metrics)

    def _feed(self, request: Request, codes: np.ndarray) -> None:
        try:
            if not request.is_dropped:
                for wave in request.sound.feed(codes):
                    request.give(wave, self._metrics)
        except Exception as error:
            self._give_up(request, error)

    def _end_stream(self, request: Request, said: Said) -> None:
        try:
            if not request.is_dropped:
                for wave in request.sound.end():
                    request.give(wave, self._metrics)
                codes = np.concatenate(said.pieces)
                speech = Speech(codes, np.empty(0), said.stopped, said.tokens, said.logprob)
                request.give(speech, self._metrics)
        except Exception as error:
            self._give_up(request, error)

    def _sound(self, request: Request, said: Said) -> None:
        try:
            if not request.is_dropped:
                speech = self.speaker.sound(said, self._settings)
                if len(speech.wave):
                    request.give(speech.wave, self._metrics)
                request.give(speech, self._metrics)
        except Exception as error:
            self._give_up(request, error)

    def _give_up(self, request: Request, error: Exception) -> None:
        if not isinstance(error, UserError):
            traceback.print_exc()
        request.give(error, self._metrics)
        self.drop(request)

    def _fail(self, error: Exception) -> None:
        """Gives all requests an error."""
        with self._changed:
            failed = [*self._speaking, *self._waiting]
            self._waiting.clear()
        self._speaking.clear()
        for request in failed:
            request.give(error, self._metrics)
