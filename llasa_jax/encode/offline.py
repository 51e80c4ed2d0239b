"""Offline encoding: audio and text become a dataset of codes, crash-safe and resumable.

It is the `Encoder` of online training over every clip of a source. Codes go into a journal,
`<out>.partial/journal.sqlite`, as they are made; the dataset is built from it when all are there.
"""

import dataclasses
import os
from collections.abc import Iterator

from tqdm import tqdm

from llasa_jax.codec import Codec, load_codec
from llasa_jax.data.bad_list import BadList, reason_of
from llasa_jax.data.builder import write_dataset
from llasa_jax.data.records import record_of
from llasa_jax.data.seal import TEXTS, check_unfinished, identity, is_made
from llasa_jax.encode.audio_source import AudioSource
from llasa_jax.encode.bucket_journal import beside, open_journal, remove_journals
from llasa_jax.encode.encoder import Encoder
from llasa_jax.encode.journal import Journal
from llasa_jax.encode.planned import PlannedClips, Skipped, planned
from llasa_jax.encode.settings import OnlineSettings
from llasa_jax.encode.sources import ManifestAudio
from llasa_jax.errors import UserError
from llasa_jax.runtime.storage import absolute, check_writable

MAX_CLIP_SECONDS = OnlineSettings().max_clip_seconds
AHEAD = 1024  # clips to choose from, for those of one length to be encoded together


@dataclasses.dataclass(frozen=True)
class Summary:
    """What `encode` did: clips encoded now, taken from the journal, and bad; hours of speech;
    examples of each split.
    """

    encoded: int
    resumed: int
    bad: int
    hours: float
    splits: dict[str, int]


def encode(
    manifest: str | os.PathLike,
    out: str | os.PathLike,
    codec: str | Codec,
    device: str = "cpu",
    validation_share: float = 0.0,
    seed: int = 0,
    max_bad_share: float = 0.05,
    batch_seconds: float = 600.0,
    workers: int = 4,
    columns: str = "",
    max_clip_seconds: float = MAX_CLIP_SECONDS,
) -> Summary:
    """Encodes a manifest's audio (`columns` are those of `read_manifest`) into a new dataset (see
    `write_dataset`) in the folder `out`.

    An utterance without a split of its own goes to "validation" or "train" by a hash of `seed` and
    its id, so it stays where it is when others come or go; `validation_share` of the clips, and
    never none, are "validation". The rest is as in `encode_audio`.
    """
    if not 0 <= validation_share < 1:
        raise UserError(f"validation_share {validation_share} must be in [0, 1).")
    _check(max_bad_share, batch_seconds, workers, max_clip_seconds)
    source = ManifestAudio(manifest, validation_share, seed, columns)
    return encode_audio(
        source, out, codec, device, max_bad_share, batch_seconds, workers, max_clip_seconds
    )


def encode_audio(
    source: AudioSource,
    out: str | os.PathLike,
    codec: str | Codec,
    device: str = "cpu",
    max_bad_share: float = 0.05,
    batch_seconds: float = 600.0,
    workers: int = 4,
    max_clip_seconds: float = MAX_CLIP_SECONDS,
) -> Summary:
    """Encodes every clip of a source of audio into a new dataset (see `write_dataset`) in `out`.

    `codec` is a loaded one, or a name or folder for `load_codec(codec, device)`. Audio is read by
    `workers` processes, no more than `batch_seconds` of it ahead of the codec. Codes are kept as
    they are made, and the same command goes on from them after an interruption; given again when
    it is done, it does nothing. Clips that cannot be read, that have no text, or that are longer
    than `max_clip_seconds` are passed over and listed, with reasons, in `<out>.bad.jsonl`. Raises
    `UserError`, keeps the journal and writes no dataset if they are more than `max_bad_share` of
    all, or all; also if `out` holds anything else or another run is writing it.
    """
    _check(max_bad_share, batch_seconds, workers, max_clip_seconds)
    out = absolute(out)
    check_writable(out.parent)
    partial, bad_list = beside(out, "partial"), BadList(beside(out, "bad.jsonl"))
    check_unfinished(out)  # before the codec is loaded
    if isinstance(codec, str | os.PathLike):
        codec = load_codec(codec, device)
    skipped = Skipped(quiet=True)
    good, made_from = _look(source, codec, max_clip_seconds, skipped)
    if (summary := is_made(out, made_from)) is not None:
        remove_journals(out)
        print(f"{out}: done already by the same command.")
        return Summary(**summary)

    with open_journal(out, source, codec.fingerprint) as journal:
        ready = {index for index in good if journal.get(index) is not None}
        if ready:
            print(f"{len(ready)} of {len(source)} clips were encoded by an earlier run.")
        if journal.damaged:
            print(f"The codes of {journal.damaged} clips in {partial} are damaged, and made again.")
        settings = OnlineSettings(
            device=device,
            workers=workers,
            read_ahead=batch_seconds,
            max_bad_share=1.0,  # judged at the end, when all good clips are encoded
            gpu_memory=0.0,
            max_clip_seconds=max_clip_seconds,
        )
        _encode(source, good - ready, codec, settings, journal, skipped)
        good -= skipped.of(0)
        for line in skipped.lines:
            bad_list.add(line)
        bad_list.publish()
        if len(skipped) > max_bad_share * len(source) or not good:
            raise UserError(
                f"{source.name}: {len(skipped)} of {len(source)} clips are bad (max_bad_share is"
                f" {max_bad_share}); the first: {skipped.lines[0]['reason']} Fix those listed in"
                f" {bad_list.path}, or take them out, and run again: the good ones are kept."
            )
        splits: dict[str, list[int]] = {}
        for index in sorted(good):
            splits.setdefault(source.split_names[index], []).append(index)
        counts = {split: len(members) for split, members in sorted(splits.items())}
        done = Summary(len(good) - len(ready), len(ready), len(skipped), 0.0, counts)
        frames: list[int] = []

        def records(indices: list[int]) -> Iterator[dict]:
            for index in indices:
                codes = journal.get(index)
                if codes is None:
                    raise UserError(
                        f"{partial}: the codes of {source.ids[index]!r} are damaged, or its audio"
                        " has changed; give the same command again, which encodes it again."
                    )
                frames.append(len(codes))
                yield record_of(source.utterance(index), codes)

        def finish() -> dict:
            nonlocal done
            hours = sum(frames) * codec.hop / codec.sample_rate / 3600
            done = dataclasses.replace(done, hours=hours)
            return dataclasses.asdict(done)

        streams = {split: records(indices) for split, indices in splits.items()}
        write_dataset(out, streams, codec_metadata(codec), made_from, finish)
    remove_journals(out)
    words = ", ".join(f"{count} {split}" for split, count in counts.items())
    print(
        f"{out}: {words}; {done.hours:.2f} hours of speech"
        + (f"; {done.bad} bad clips, see {bad_list.path}." if done.bad else ".")
    )
    return done


def _encode(
    source: AudioSource,
    wanted: set[int],
    codec: Codec,
    settings: OnlineSettings,
    journal: Journal,
    skipped: Skipped,
) -> None:
    """Puts the codes of these clips into the journal, or the clips into `skipped`."""
    # Neighbours in file size are near in length: the codec batches equal lengths, and the longest
    # come last.
    todo = sorted(wanted, key=lambda index: (source.key(index)[1], source.ids[index]))
    settings = dataclasses.replace(settings, workers=min(settings.workers, max(len(todo), 1)))
    clips = PlannedClips(source, source.split_names[0], 0, skipped)
    groups = (([planned(source.utterance(index), (0, index))], None) for index in todo)
    encoder = Encoder(codec, [clips], settings, [journal])
    try:
        for _ in tqdm(encoder.encode(groups, AHEAD), "encode", len(todo), unit="clip"):
            pass
    finally:
        encoder.stop()


def codec_metadata(codec: Codec) -> dict:
    """What a dataset says of the codec that made it."""
    return {
        "codec": codec.name,
        "fingerprint": codec.fingerprint,
        "hop": codec.hop,
        "sample_rate": codec.sample_rate,
    }


def _look(
    source: AudioSource, codec: Codec, max_clip_seconds: float, skipped: Skipped
) -> tuple[set[int], str]:
    """The clips that may be encoded, and the identity of the command. Others go to `skipped`."""
    good: set[int] = set()

    def rows() -> Iterator[tuple]:
        for index in range(len(source)):
            # Neither the paths nor the order matter, but what lies there.
            yield source.ids[index], source.split_names[index], *source.key(index)[1:]
            try:
                if index in source.faults:
                    raise UserError(source.faults[index])
                utterance = source.utterance(index)
                source.check_text(index, utterance.text)
            except Exception as error:  # noqa: BLE001 one clip never ends all
                skipped.add((0, index), source.ids[index], source.key(index)[0], reason_of(error))
                continue
            good.add(index)
            yield tuple(getattr(utterance, name) for name in TEXTS)

    return good, identity("encode", codec.fingerprint, max_clip_seconds, rows())


def _check(max_bad_share: float, batch_seconds: float, workers: int, max_seconds: float) -> None:
    faults = {
        f"max_bad_share {max_bad_share} must be in [0, 1]": not 0 <= max_bad_share <= 1,
        f"batch_seconds {batch_seconds} must be above 0": not 0 < batch_seconds < float("inf"),
        f"workers {workers} must be in [1, 1024]": not 1 <= workers <= 1024,
        f"max_clip_seconds {max_seconds} must be above 0": not max_seconds > 0,
    }
    for words, wrong in faults.items():
        if wrong:
            raise UserError(f"{words}; correct the setting.")
