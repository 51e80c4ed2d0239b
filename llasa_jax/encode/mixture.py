"""The datasets of a run, opened: records of codes, conversations, and clips of audio that are yet
to be encoded.
"""

from collections.abc import Sequence

from llasa_jax.codec import Codec
from llasa_jax.data.builder import read_metadata
from llasa_jax.data.conversations import Conversations
from llasa_jax.data.records import open_utterances
from llasa_jax.data.settings import SourceSettings
from llasa_jax.encode.audio_source import AudioSource
from llasa_jax.encode.planned import PlannedClips, Skipped
from llasa_jax.encode.settings import OnlineSettings
from llasa_jax.encode.sources import open_audio
from llasa_jax.errors import UserError


def open_sources(
    sources: Sequence[SourceSettings], online: OnlineSettings | None = None
) -> tuple[list[Sequence], list[Sequence | None]]:
    """The training records and the validation records (None where there is no such split) of each
    source. UserError if one is not there.

    Those of audio are `PlannedClips`, for `online_cache.open_encoder` to make codes of; sources
    with one path share it.
    """
    audio: dict[str, AudioSource] = {}
    skipped = Skipped()

    def open_split(source: SourceSettings, split: str) -> Sequence:
        if source.mode != "online":
            return _open(source, split)
        if source.path not in audio:
            audio[source.path] = open_audio(source.path, online or OnlineSettings())
        return PlannedClips(audio[source.path], split, list(audio).index(source.path), skipped)

    return [open_split(source, source.split) for source in sources], [
        open_split(source, source.validation_split) if source.validation_split else None
        for source in sources
    ]


def codec_of(sources: Sequence[SourceSettings], encoding: Codec | None = None) -> dict[str, str]:
    """The `codec` and `fingerprint` that all speech sources name, {} where none does. UserError
    where they differ.

    `encoding` is the codec of the sources of audio.
    """
    known: dict[str, tuple[str, dict]] = {}
    for source in sources:
        metadata = {}
        if source.mode == "online":
            metadata = (
                {"codec": encoding.name, "fingerprint": encoding.fingerprint} if encoding else {}
            )
        elif not source.is_chat:
            metadata = read_metadata(source.path)
        if metadata.get("fingerprint", "unknown") != "unknown":
            known.setdefault(
                metadata["fingerprint"],
                (source.path, {name: metadata.get(name) for name in ("codec", "fingerprint")}),
            )
    if len(known) > 1:
        (first, codec), (second, other_codec), *_ = known.values()
        raise UserError(
            f"{first} holds codes of {codec['codec']} and {second} of {other_codec['codec']};"
            " encode both with the same codec"
        )
    return next((codec for _, codec in known.values()), {})


def _open(source: SourceSettings, split: str) -> Sequence:
    if not source.is_chat:
        return open_utterances(source.path, split)
    if source.validation_split:
        raise UserError(
            f"{source.path}: a file of conversations has no splits; leave its validation_split out"
        )
    return Conversations(source.path)
