"""Online training's batches: a thread encodes ahead of the devices and fills the rows that were
planned without codes.
"""

import copy
import queue
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain

import grain

from llasa_jax.data.batching import BatchShape, Planned, Source, fill, plan
from llasa_jax.encode.encoder import READING, Encoder
from llasa_jax.encode.planned import PlannedClip
from llasa_jax.runtime.signals import UNINTERRUPTIBLE

POLL = 0.1  # seconds between looks at whether to stop
ADVISED_AFTER = 20  # steps
Rows = list[list[Planned]]


class OnlineBatches(grain.DatasetIterator):
    """The batches that `batching.batches` would make of the same clips, had they been encoded
    before.

    Options are those of `plan`. No more than `data.online.queue` batches wait to be taken, and as
    many are planned ahead of them. The state is Grain's, after the last batch taken. The thread
    begins when the first batch is waited for, and ends with the encoder; it is a daemon, since
    nobody can interrupt a codec.
    """

    def __init__(self, encoder: Encoder, sources: Sequence[Source], shape: BatchShape, **options):
        super().__init__()
        self._encoder, self._settings, self._shape = encoder, encoder.settings, shape
        self._sources = sources
        self._plan = iter(plan(sources, shape, **options))
        self._state = self._plan.get_state()
        self._ready: queue.Queue[tuple[dict, dict]] = queue.Queue(self._settings.queue)
        self._thread = threading.Thread(target=self._work, name=UNINTERRUPTIBLE, daemon=True)
        self._failure: BaseException | None = None
        self._steps = 0
        self._before = (time.monotonic(), encoder.encoded_seconds)

    def get_state(self) -> dict:
        return self._state

    def set_state(self, state: dict) -> None:
        """Goes to another place. After the first batch that is only what `get_state` tells: the
        thread goes on where it is.
        """
        if self._thread.ident is None:
            self._plan.set_state(state)
        self._state = state

    def wait(self, interrupted: Callable[[], int]) -> bool:
        """Waits until there is a batch, or `interrupted()`, and warns of long waits. False if the
        thread has failed: `next` says why.
        """
        if self._thread.ident is None:
            self._thread.start()
        began, limit = time.monotonic(), self._settings.stall_seconds
        while self._failure is None and self._ready.empty() and not interrupted():
            time.sleep(POLL / 10)
            waited = time.monotonic() - began
            # Slow audio the encoder itself reports.
            if waited > limit and not self._encoder.doing.startswith(READING):
                warnings.warn(
                    f"training has waited {waited:.0f} s for data: the encoder is"
                    f" {self._encoder.doing}",
                    stacklevel=2,
                )
                limit *= 2
        return self._failure is None

    def __next__(self) -> dict:
        self.wait(lambda: 0)
        if self._failure is not None:
            raise self._failure
        batch, self._state = self._ready.get()
        return batch

    def numbers(self) -> dict[str, float]:
        """For the metrics: batches that wait, seconds of audio encoded in a second since the last
        call, and clips skipped so far.
        """
        now = time.monotonic(), self._encoder.encoded_seconds
        (before, encoded), self._before = self._before, now
        return {
            "queue_depth": self._ready.qsize(),
            "encoded_seconds_per_second": (now[1] - encoded) / max(now[0] - before, 1e-9),
            "skipped_clips": len(self._encoder.skipped),
        }

    def advice(self, data_wait: float) -> str:
        """What would help, once, where the devices keep waiting for the encoder; else nothing."""
        self._steps += 1
        if self._steps != ADVISED_AFTER or data_wait < 0.1:
            return ""
        ideas = (
            [] if self._settings.cache else ["data.online.cache, so that no clip is encoded twice"]
        )
        if self._settings.device == "cpu":
            ideas += ["data.online.device=cuda or jax, or more data.online.torch_threads"]
        ideas += [
            "more data.online.workers, if reading is slow",
            "or `llasa-jax encode` first, and training offline",
        ]
        return (
            f"the devices wait {data_wait:.0%} of the time for the encoder; it would help to set"
            f" {', '.join(ideas)}"
        )

    def _work(self) -> None:
        try:
            for codes, (rows, state) in self._encoder.encode(
                self._planned(), ahead=self._settings.queue
            ):
                rows = [[encoded(one, self._sources, codes) for one in row] for row in rows]
                batch = fill(rows, self._shape)
                self._encoder.doing = "done, as the queue is full"
                while not self._encoder.closed.is_set():
                    try:
                        self._ready.put((batch, state), timeout=POLL)
                        break
                    except queue.Full:
                        pass
        except BaseException as error:  # noqa: BLE001 raised again where the batch is asked for
            self._failure = error

    def _planned(self) -> Iterator[tuple[list[PlannedClip], tuple[Rows, dict]]]:
        for rows in self._plan:
            yield to_encode(chain(*rows)), (rows, copy.deepcopy(self._plan.get_state()))


def to_encode(planned: Iterable[Planned]) -> list[PlannedClip]:
    """The clips among what is planned that must be encoded before rows can be filled."""
    return [
        one.record
        for one in planned
        if one.example is not None
        and one.example.lacks_codes
        and isinstance(one.record, PlannedClip)
    ]


def encoded(planned: Planned, sources: Sequence[Source], codes: dict) -> Planned:
    """The planned record with its example whole, by the codes of `Encoder.encode`; without an
    example where its clip turned out bad.
    """
    example = planned.example
    if example is None or not example.lacks_codes or not isinstance(planned.record, PlannedClip):
        return planned
    made = codes[planned.record.key]
    if made is None:
        return replace(planned, example=None)
    prompter = sources[planned.source].prompter
    return replace(planned, example=prompter.with_codes(example, made))
