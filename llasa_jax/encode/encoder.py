"""Codes made as they are wanted: clips are read ahead, encoded with others of their length, and
given in the order they were asked for.
"""

import threading
import warnings
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Protocol, TypeVar, runtime_checkable

import jax
import numpy as np

from llasa_jax.codec import HOP, MAX_BATCH_SAMPLES, Codec
from llasa_jax.data.batching import Source
from llasa_jax.encode.planned import EncodedClips, PlannedClip, PlannedClips
from llasa_jax.encode.readers import Key, Readers
from llasa_jax.encode.settings import OnlineSettings
from llasa_jax.errors import UserError
from llasa_jax.runtime import hosts
from llasa_jax.speech.audio import SAMPLE_RATE

ENOUGH = 1000  # clips, or all if they are fewer, before a share of bad ones says anything
READING = "reading the audio "
LIKELY = 10 * SAMPLE_RATE  # samples of a clip whose header has not been read
T = TypeVar("T")


class Cache(Protocol):
    """Codes of one source's clips that were made before: `Journal`, `CodesCache`."""

    def get(self, index: int) -> np.ndarray | None: ...

    def put(self, clips: Sequence[tuple[int, np.ndarray]]) -> None: ...

    def close(self) -> None: ...


@runtime_checkable
class Finishing(Protocol):
    """A cache that becomes a dataset once it has all clips but the skipped ones."""

    def finish(self, skipped: set[int]) -> None: ...


class Encoder:
    """A codec, the processes that read for it, and the caches of what it has made, one a source
    (None without), which may be changed between two calls of `encode`. A context, at whose end
    caches are closed.

    `clips` are all splits of all sources. Codes are those of each clip alone: clips share the
    codec's batch only with others of their length (see `Xcodec2Codec`).
    """

    def __init__(
        self,
        codec: Codec,
        clips: Sequence[PlannedClips],
        settings: OnlineSettings,
        caches: Sequence[Cache | None],
    ):
        self.codec, self.splits, self.settings = codec, clips, settings
        self.skipped = clips[0].skipped
        self.caches = caches
        self._sources = list(
            {one.number: one.audio for one in sorted(clips, key=lambda one: one.number)}.values()
        )
        self._used = [np.zeros(len(source), bool) for source in self._sources]
        self._used_clips = 0
        self._readers: Readers | None = None
        # clip -> the last multiple of `stall_seconds` at which a warning was given
        self._warned: dict[Key, float] = {}
        self.closed = threading.Event()
        self.encoded_seconds = 0.0
        self.doing = "planning"

    def encode(
        self, wanted: Iterator[tuple[Sequence[PlannedClip], T]], ahead: int
    ) -> Iterator[tuple[dict[Key, np.ndarray | None], T]]:
        """For every group of clips with whatever comes with it, in order: the codes of each, None
        for those that are bad.

        Looks `ahead` groups ahead, for clips to encode together. Ends early once the encoder is
        closed. UserError where too many are bad.
        """
        groups: deque[tuple[list[Key], T]] = deque()
        users: Counter[Key] = Counter()  # how many groups still want a clip
        codes: dict[Key, np.ndarray | None] = {}
        missing: dict[Key, PlannedClip] = {}  # in the order in which they are needed
        unread: deque[Key] = deque()
        waves: dict[Key, np.ndarray] = {}
        held: Counter[Key] = Counter()  # samples of the clips that are being read, or are read
        more = True
        while not self.closed.is_set():
            while more and len(groups) < ahead:
                self.doing = "reading how long the next clips are"
                group = next(wanted, None)
                if group is None:
                    more = False
                    break
                clips, payload = group
                groups.append(([clip.key for clip in clips], payload))
                for clip in clips:
                    users[clip.key] += 1
                    if clip.key in codes or clip.key in missing:
                        continue
                    known, codes_ = self._known(clip)
                    if known:
                        codes[clip.key] = codes_
                    else:
                        missing[clip.key] = clip
                        unread.append(clip.key)
                self._check_share()
            if not groups:
                return
            while unread and (not held or held.total() < self.settings.read_ahead * SAMPLE_RATE):
                key = unread.popleft()
                held[key] = missing[key].num_codes * HOP or LIKELY
                self._start_readers().submit(key)
            if all(key in codes for key in groups[0][0]):
                keys, payload = groups.popleft()
                yield {key: codes[key] for key in keys}, payload
                users.subtract(keys)
                for key in {key for key in keys if not users[key]}:
                    del users[key], codes[key]
                continue
            for key, wave, reason in self._receive(block=not waves):
                planned = missing[key].num_codes
                if not reason and planned and wave is not None and _frames(wave) != planned:
                    reason = (
                        f"{self._name(key)}: its length is not the one that its header tells;"
                        " export it again from its source"
                    )
                if reason or wave is None:
                    del held[key]
                    codes[key] = None
                    self.skipped.add(key, missing.pop(key).id, self._name(key), reason)
                    self._check_share()
                else:
                    waves[key], held[key] = wave, len(wave)
            if waves:
                together = self._alike(missing, waves)
                made = self._encode(together, [waves.pop(key) for key in together])
                for key, its_codes in zip(together, made, strict=True):
                    del missing[key], held[key]
                    codes[key] = its_codes

    def held_out(self, sources: Sequence[Source]) -> list[Source]:
        """Sources to run through once (see `plan`), with the codes of all clips made now and kept
        in memory. Each host makes its share of them, and all hosts must ask.
        """
        every = [(source.records, i) for source in sources for i in range(len(source.records))]
        own = every[jax.process_index() :: jax.process_count()]
        clips = [
            clip for records, i in own if isinstance(records, PlannedClips) and (clip := records[i])
        ]
        groups = ((clips[i : i + 32], None) for i in range(0, len(clips), 32))
        made_here: dict[Key, np.ndarray | None] = {}
        for made, _ in self.encode(groups, ahead=4):
            made_here |= made
        codes: dict[Key, np.ndarray | None] = {}
        for part in hosts.everyones(
            [(key, None if made is None else made.tolist()) for key, made in made_here.items()]
        ):
            codes |= {
                (source, index): None if made is None else np.array(made, np.uint16)
                for (source, index), made in part
            }
        return [
            (
                replace(source, records=EncodedClips(source.records, codes))
                if isinstance(source.records, PlannedClips)
                else source
            )
            for source in sources
        ]

    def finish(self) -> None:
        """Encodes no more, and turns caches that are whole into datasets."""
        self.stop()
        for number, cache in enumerate(self.caches):
            if isinstance(cache, Finishing):
                cache.finish(self.skipped.of(number))

    def stop(self) -> None:
        """Encodes and reads no more."""
        self.closed.set()
        if self._readers:
            self._readers.close()

    def __enter__(self):
        if not all(self.caches):
            self._start_readers()  # while the model is loaded
        return self

    def __exit__(self, *error):
        self.stop()
        for cache in filter(None, self.caches):
            cache.close()

    def _known(self, clip: PlannedClip) -> tuple[bool, np.ndarray | None]:
        """Whether there is nothing to encode, and the codes; None for a bad clip."""
        number, index = clip.key
        self._used_clips += not self._used[number][index]
        self._used[number][index] = True
        if clip.key in self.skipped:
            return True, None
        cache = self.caches[number]
        codes = cache.get(index) if cache else None
        return codes is not None and clip.num_codes in (0, len(codes)), codes

    def _start_readers(self) -> Readers:
        if self._readers is None:
            self._readers = Readers(
                self._sources, self.settings.workers, self.settings.max_clip_seconds
            )
        return self._readers

    def _receive(self, block: bool) -> list[tuple[Key, np.ndarray | None, str]]:
        self.doing = READING
        readers = self._start_readers()
        received = readers.receive(0.2 if block else 0)
        if not block or received:
            return received
        self.doing = "starting the processes that read audio"
        if slowest := readers.slowest():
            key, seconds = slowest
            self.doing = f"{READING}{self._name(key)}"
            # Warns after the time that is set, after twice that, four times: not for ever.
            turns = seconds / self.settings.stall_seconds
            if turns >= 1 and turns >= 2 * self._warned.get(key, 0.5):
                self._warned = {key: turns}
                warnings.warn(
                    f"the data source is stalled: reading {self._name(key)} has taken {seconds:.0f}"
                    " s so far",
                    stacklevel=2,
                )
        return received

    def _encode(self, keys: list[Key], waves: list[np.ndarray]) -> list[np.ndarray]:
        seconds = sum(map(len, waves)) / SAMPLE_RATE
        self.doing = f"encoding {len(keys)} clips, {seconds:.0f} s of audio"
        try:
            codes = self.codec.encode(waves)
        except (RuntimeError, MemoryError) as error:
            # PyTorch's words on a GPU, and on a CPU; JAX's
            words = ("out of memory", "can't allocate memory", "RESOURCE_EXHAUSTED")
            if isinstance(error, RuntimeError) and not any(word in str(error) for word in words):
                raise
            longest = max(zip(waves, keys, strict=True), key=lambda one: len(one[0]))
            # JAX's codec takes from the pool that training has, whatever the share.
            share = 0 if self.settings.device.startswith("jax") else self.settings.gpu_memory
            raise UserError(
                f"the codec ran out of memory on {self.settings.device}, {self.doing}, of which"
                f" {self._name(longest[1])} is the longest ({len(longest[0]) / SAMPLE_RATE:.0f} s);"
                f" lower max_clip_seconds (it is {self.settings.max_clip_seconds:g}), name another"
                " device" + (f", or raise data.online.gpu_memory (it is {share})" if share else "")
            ) from error
        self.encoded_seconds += seconds
        for number, cache in enumerate(self.caches):
            if cache:
                cache.put(
                    [
                        (index, made)
                        for (source, index), made in zip(keys, codes, strict=True)
                        if source == number
                    ]
                )
        return codes

    def _alike(self, missing: dict[Key, PlannedClip], waves: dict[Key, np.ndarray]) -> list[Key]:
        """Of the clips that are read the one that is needed first, and others of its length, or of
        the length that the codec pads it to, as many as it takes at once.
        """
        # PyTorch's codec takes clips of one length alone, JAX's pads.
        padded = getattr(self.codec, "padded_frames", int)
        frames = padded(_frames(next(waves[key] for key in missing if key in waves)))
        alike = [key for key in missing if key in waves and padded(_frames(waves[key])) == frames]
        return alike[: max(1, MAX_BATCH_SAMPLES // (frames * HOP))]

    def _check_share(self) -> None:
        seen = max(self._used_clips, min(sum(map(len, self._used)), ENOUGH))
        if len(self.skipped) > self.settings.max_bad_share * seen:
            raise UserError(
                f"{len(self.skipped)} clips of audio are bad, more than"
                f" data.online.max_bad_share={self.settings.max_bad_share} of {seen};"
                f" {self.skipped.explained()}; fix them, take them out, or raise the share"
            )

    def _name(self, key: Key) -> str:
        return self._sources[key[0]].key(key[1])[0]


def _frames(wave: np.ndarray) -> int:
    return len(wave) // HOP + 1
