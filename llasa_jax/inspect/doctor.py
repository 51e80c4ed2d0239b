"""Looks for what has cost people weeks: broken codes, doubled or leaking clips, texts of other
clips, the wrong tokenizer or codec.

Each check returns findings; `ok` ones say what was looked at, so that silence is never taken for
health.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import jax
import numpy as np

from llasa_jax.codec import Codec, load_codec
from llasa_jax.convert import model_folder
from llasa_jax.convert.model_folder import load_tokenizer
from llasa_jax.data.builder import read_metadata
from llasa_jax.data.importing import UNKNOWN_CODEC
from llasa_jax.data.records import open_utterances
from llasa_jax.data.settings import SourceSettings
from llasa_jax.encode.mixture import codec_of, open_sources
from llasa_jax.encode.settings import DataSettings
from llasa_jax.errors import UserError
from llasa_jax.inspect.scan import Scan, repeated_codes, scan, suspicious_pace
from llasa_jax.runtime.files import read_json
from llasa_jax.speech.prompts import Prompter
from llasa_jax.speech.vocab import NUM_CODES, SpeechVocab
from llasa_jax.train.settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QUICK, THOROUGH = (
    2_000,
    200_000,
)  # records of each split that are looked at: about a second's, and minutes' worth
HEADERS = 500  # of audio, a second's worth on a local disk
MANY = 0.01  # a share of records from which on a fault is not an odd clip but a broken dataset


@dataclass(frozen=True)
class Finding:
    """`severity` "bad" makes training worthless, "warn" worse. `ids` are examples. `fix` says what
    to do; "" for ok.
    """

    severity: Literal["ok", "warn", "bad"]
    check: str
    message: str
    fix: str = ""
    ids: tuple[str, ...] = ()

    def __str__(self) -> str:
        ids = f" [{', '.join(self.ids)}]" if self.ids else ""
        return f"{self.severity:4}  {self.check:9}  {self.message}{ids}" + (
            f"; {self.fix}" if self.fix else ""
        )


def doctor(
    settings: Settings,
    codec: str | Codec | None = None,
    device: str = "cpu",
    sample: int = THOROUGH,
) -> list[Finding]:
    """Examines what `train` would train on, looking at no more than `sample` records of each split.

    `codec`, a loaded one or a name for `load_codec(codec, device)`, is examined too if given. Never
    raises UserError: what would is a finding.
    """
    findings, tokenizer = [], None
    model = Path(settings.model.path)
    try:
        tokenizer = load_tokenizer(model)
        findings += check_tokenizer(model, tokenizer)
    except UserError as error:
        findings.append(Finding("bad", "tokenizer", str(error)))
    if len(settings.sources) > 1:
        try:
            codec_of(settings.sources)
        except UserError as error:
            findings.append(Finding("bad", "codec", str(error)))
    for source in settings.sources:
        if source.mode == "online":
            findings += _examine_audio(source, settings.data, tokenizer)
        elif source.prompt.task != "chat":
            findings += _examine_source(source, settings.data, tokenizer, codec, device, sample)
    return findings


def _examine_audio(source: SourceSettings, data: DataSettings, tokenizer) -> list[Finding]:
    """A source that is encoded while training, whose codes nobody has seen: its texts, and the
    headers of some of its audio.
    """
    try:
        prompter = Prompter(tokenizer, source.prompt) if tokenizer else None
        (clips,), _ = open_sources([source], data.online)
        looked = [clips[int(i)] for i in np.linspace(0, len(clips) - 1, min(len(clips), HEADERS))]
        readable = [clip for clip in looked if clip is not None]
        for clip in readable if prompter else ():
            prompter.plan(clip)
    except UserError as error:
        return [Finding("bad", "audio", str(error))]
    unreadable = 1 - len(readable) / len(looked)
    message = (
        f"{source.path} is encoded while training: its codes cannot be examined before,"
        f" {len(looked):,} of {len(clips):,} headers were"
    )
    fix = "mend the clips that the warnings name, or take them out"
    if unreadable > data.online.max_bad_share:
        return [
            Finding("bad", "audio", f"{message}, and {unreadable:.0%} of them cannot be read", fix)
        ]
    return [Finding("warn" if unreadable else "ok", "audio", message, fix if unreadable else "")]


def _examine_source(
    source: SourceSettings, data: DataSettings, tokenizer, codec, device: str, sample: int
) -> list[Finding]:
    """One dataset of codes: its records, and the codec that made them."""
    findings, prompter, scans = [], None, {}
    try:
        prompter = Prompter(tokenizer, source.prompt) if tokenizer else None
    except UserError as error:
        findings.append(Finding("bad", "tokenizer", str(error)))
    for split in dict.fromkeys(filter(None, (source.split, source.validation_split))):
        try:
            scans[split] = scan(open_utterances(source.path, split), sample, prompter)
        except UserError as error:
            findings.append(Finding("bad", "split", str(error)))
    if scans:
        looked = ", ".join(
            f"{len(one.ids):,} of {one.size:,} clips of {split}" for split, one in scans.items()
        )
        findings.append(Finding("ok", "records", f"looked at {looked} in {source.path}"))
        findings += check_scans(scans, data.max_length, data.too_long)
        if source.validation_split == source.split:
            findings.append(
                Finding(
                    "warn",
                    "leak",
                    "validation is on the clips that are trained on",
                    "set data.validation_split to another",
                )
            )
        findings += check_codec(
            read_metadata(source.path), codec, device, _some_codes(source.path, next(iter(scans)))
        )
    return findings


def check_tokenizer(model: Path, tokenizer: "PreTrainedTokenizerBase") -> list[Finding]:
    """Whether a tokenizer is the one that the weights in the folder `model` were made for.
    UserError if it has no speech tokens.
    """
    config, _ = model_folder.read_description(model)
    size, base = len(tokenizer), SpeechVocab.of(tokenizer).code_base
    fix = f"import the model again, with its own tokenizer in {model / model_folder.HF_FOLDER}"
    if size != config.vocab_size:
        severity = "bad" if size > config.vocab_size else "warn"
        return [
            Finding(
                severity,
                "tokenizer",
                f"the tokenizer has {size} tokens, the model {config.vocab_size}",
                fix,
            )
        ]
    path = model / model_folder.HF_FOLDER / "config.json"
    hf = read_json(path, "the model's HF config") if path.is_file() else {}
    ends = hf.get("eos_token_id") or []
    for name, wanted in {
        "bos_token_id": [hf.get("bos_token_id")],
        "eos_token_id": ends if isinstance(ends, list) else [ends],
    }.items():
        for number in filter(lambda n: n is not None, wanted):
            if number not in tokenizer.added_tokens_decoder or (
                name == "bos_token_id" and number != tokenizer.bos_token_id
            ):
                token = tokenizer.convert_ids_to_tokens(number)
                return [
                    Finding(
                        "bad",
                        "tokenizer",
                        f"the model's {name} {number} is {token!r} in the tokenizer: they are no"
                        " pair",
                        fix,
                    )
                ]
    return [
        Finding("ok", "tokenizer", f"{size} tokens, as many as the model has; <|s_0|> is {base}")
    ]


def check_scans(scans: dict[str, Scan], max_length: int, too_long: str = "drop") -> list[Finding]:
    """All that can be seen in the records of one or two splits themselves. The first is the one
    that is trained on.
    """
    findings = []
    for split, one in scans.items():
        findings += (
            _check_refused(split, one)
            + _check_codes(split, one)
            + _check_lengths(split, one, max_length, too_long)
        )
    return findings + _check_repeats(scans) + _check_leaks(scans) + _check_pace(scans)


def _check_refused(split: str, one: Scan) -> list[Finding]:
    if not one.refused:
        return []
    first = one.refused[0][1]
    message = (
        f"{_clips(len(one.refused), one)} of {split} cannot become a prompt: {first.split(';')[0]}"
    )
    return [
        Finding(
            "bad",
            "prompt",
            message,
            "mend them or leave them out; training stops at the first",
            _ids(i for i, _ in one.refused),
        )
    ]


def _check_codes(split: str, one: Scan) -> list[Finding]:
    findings = []
    total, valid = int(one.codes.sum()), int(one.usage.sum())
    if valid < total:
        message = f"{total - valid:,} of {total:,} codes of {split} lie outside 0..{NUM_CODES - 1}"
        fix = (
            "subtract the vocabulary's offset, 128264 in Llasa's own"
            if valid < total / 2
            else "encode the clips again"
        )
        findings.append(Finding("bad", "codes", message, fix))
    constant = np.flatnonzero((one.codes >= 50) & (one.distinct <= 0.02 * one.codes))
    if len(constant):
        severity = "bad" if len(constant) > MANY * len(one.ids) else "warn"
        message = f"{_clips(len(constant), one)} of {split} repeat one or a few codes throughout"
        findings.append(
            Finding(
                severity,
                "codes",
                message,
                "listen to them: silence, or a broken codec",
                _ids(one.ids[i] for i in constant),
            )
        )
    used = int((one.usage > 0).sum())
    if valid >= 100_000 and used < 1000:
        message = f"{split} uses only {used} of {NUM_CODES:,} codes in {valid:,}"
        findings.append(
            Finding(
                "bad",
                "codes",
                message,
                "encode again with XCodec2; these come from another codec or a broken one",
            )
        )
    return findings or [
        Finding("ok", "codes", f"{total:,} codes of {split} use {used:,} of {NUM_CODES:,}")
    ]


def _check_lengths(split: str, one: Scan, max_length: int, too_long: str) -> list[Finding]:
    if one.tokens is None:
        return []
    beyond = np.flatnonzero(one.tokens > max_length)
    if not len(beyond):
        return [
            Finding(
                "ok",
                "length",
                f"every clip of {split} fits {max_length} tokens; the longest has"
                f" {one.tokens.max(initial=0)}",
            )
        ]
    about = (
        f"{_clips(len(beyond), one)} of {split}"
        f" ({one.seconds[beyond].sum() / max(one.seconds.sum(), 1e-9):.1%} of its speech)"
    )
    longest = f"the longest has {one.tokens.max()}"
    ids = _ids(one.ids[i] for i in beyond)
    if too_long == "cut":
        message = f"{about} lose their end marker at data.max_length={max_length}; {longest}"
        return [
            Finding(
                "warn",
                "length",
                message,
                "set data.too_long to drop, or raise data.max_length: they teach not to stop",
                ids,
            )
        ]
    severity = "bad" if len(beyond) > len(one.ids) / 2 else "warn"
    message = f"{about} do not fit data.max_length={max_length} and are dropped; {longest}"
    return [
        Finding(
            severity, "length", message, "raise data.max_length, or split them into sentences", ids
        )
    ]


def _check_repeats(scans: dict[str, Scan]) -> list[Finding]:
    findings, seen = [], list(scans.values())
    for split, one in scans.items():
        groups = repeated_codes([one])
        texts = [len({one.text_digests[row] for _, row in group}) for group in groups]
        for several, what in ((True, "under other texts"), (False, "under the same text")):
            mine = [
                group for group, count in zip(groups, texts, strict=True) if (count > 1) == several
            ]
            clips = sum(len(group) for group in mine)
            if not mine:
                continue
            severity = "bad" if several and clips > MANY * len(one.ids) else "warn"
            fix = "find which text is right" if several else "leave out all but one"
            message = f"{_clips(clips, one)} of {split} have the very codes of another clip, {what}"
            findings.append(
                Finding(
                    severity, "duplicate", message, fix, _ids(one.ids[row] for _, row in mine[0])
                )
            )
    return findings or [
        Finding(
            "ok",
            "duplicate",
            f"no two of {sum(len(one.ids) for one in seen):,} clips have the same codes",
        )
    ]


def _check_leaks(scans: dict[str, Scan]) -> list[Finding]:
    if len(scans) < 2:
        return []
    (train_name, train), (name, held_out) = list(scans.items())[:2]
    ids, codes = set(train.ids), set(train.code_digests)
    leaks = [
        i
        for i, (row_id, digest) in enumerate(zip(held_out.ids, held_out.code_digests, strict=True))
        if row_id in ids or digest in codes
    ]
    if not leaks:
        return [Finding("ok", "leak", f"no clip of {name} is in {train_name}")]
    severity = "bad" if len(leaks) > MANY * len(held_out.ids) else "warn"
    message = (
        f"{_clips(len(leaks), held_out)} of {name} are in {train_name} too, so the validation loss"
        " flatters"
    )
    return [
        Finding(
            severity, "leak", message, "split the clips anew", _ids(held_out.ids[i] for i in leaks)
        )
    ]


def _check_pace(scans: dict[str, Scan]) -> list[Finding]:
    findings, splits = [], list(scans.items())
    codes = np.concatenate([one.codes for one in scans.values()])
    text_bytes = np.concatenate([one.text_bytes for one in scans.values()])
    lengths = np.log(np.maximum([codes, text_bytes], 1))
    # Where either hardly varies, as in corpora of single words, its correlation says nothing.
    if (
        len(codes) >= 100
        and lengths.std(1).min() > 0.15
        and (together := np.corrcoef(lengths)[0, 1]) < 0.2
    ):
        message = (
            f"long texts do not go with long clips (correlation {together:.2f}; real speech has"
            " above 0.8)"
        )
        return [
            Finding(
                "bad",
                "pace",
                message,
                "the texts belong to other clips: look for rows that slipped in the manifest",
            )
        ]
    pace = float(np.median(codes / np.maximum(text_bytes, 1)))
    if not 0.4 < pace < 25:
        message = (
            f"half the clips have more than {pace:.2f} codes a byte of text, where reading aloud"
            " takes about 3.5"
        )
        findings.append(
            Finding(
                "warn",
                "pace",
                message,
                "see that texts and codes belong together, and that codes are 50 a second",
            )
        )
    for what, parts, fix in zip(
        ("far too many codes for their text", "far too few codes for their text"),
        suspicious_pace(list(scans.values())),
        (
            "look for long silence, or speech that the text lacks",
            "look for cut audio, or text that is not spoken",
        ),
        strict=True,
    ):
        for (split, one), rows in zip(splits, parts, strict=True):
            if len(rows):
                severity = "bad" if len(rows) > 0.2 * len(one.ids) else "warn"
                findings.append(
                    Finding(
                        severity,
                        "pace",
                        f"{_clips(len(rows), one)} of {split} have {what}",
                        fix,
                        _ids(one.ids[i] for i in rows),
                    )
                )
    return findings or [
        Finding(
            "ok",
            "pace",
            f"texts and clips go together: {pace:.1f} codes a byte of text at the median",
        )
    ]


def check_codec(
    metadata: dict, codec: str | Codec | None, device: str = "cpu", codes: np.ndarray | None = None
) -> list[Finding]:
    """Whether a codec loads whole, means by a code what the dataset means, repeats itself, and
    makes sound of `codes`.
    """
    recorded, fingerprint = (
        metadata.get("codec", UNKNOWN_CODEC),
        metadata.get("fingerprint", UNKNOWN_CODEC),
    )
    if codec is None:
        if recorded == UNKNOWN_CODEC:
            fix = "see that it is the model's, and listen with `generate` early"
            return [
                Finding("warn", "codec", "the dataset does not say which codec made its codes", fix)
            ]
        return [Finding("ok", "codec", f"codes of {recorded}; give --codec to examine it")]
    if isinstance(codec, str | Path):
        try:
            codec = load_codec(codec, device)
        except UserError as error:
            return [Finding("bad", "codec", str(error))]
    findings = []
    if fingerprint == UNKNOWN_CODEC:
        findings.append(
            Finding(
                "warn",
                "codec",
                "the dataset lacks a fingerprint of its codec to compare with",
                "encode it again to be sure",
            )
        )
    elif fingerprint != codec.fingerprint:
        message = (
            f"the dataset's codes are of {recorded} ({fingerprint}), but {codec.name} is another"
            f" codec ({codec.fingerprint})"
        )
        findings.append(Finding("bad", "codec", message, f"use {recorded}, or encode again"))
    time = np.arange(2 * codec.sample_rate) / codec.sample_rate
    # A voice-like buzz: a gliding pitch with falling overtones.
    pitch = 2 * np.pi * np.cumsum(120 + 40 * np.sin(2 * np.pi * 0.7 * time)) / codec.sample_rate
    wave = (0.3 * sum(np.sin(k * pitch) / k for k in range(1, 12))).astype(np.float32) / 2
    alone, (again, _) = codec.encode([wave])[0], codec.encode([wave, wave[::-1].copy()])
    if not np.array_equal(alone, again):
        message = (
            f"{codec.name} encodes one clip to other codes the second time"
            f" ({np.mean(alone != again):.0%} differ)"
        )
        findings.append(Finding("bad", "codec", message, "use it in eval mode and float32"))
    if len(np.unique(alone)) < 10:
        message = (
            f"{codec.name} makes only {len(np.unique(alone))} different codes of two seconds of"
            " sound"
        )
        findings.append(
            Finding("bad", "codec", message, "its weights are broken: get the checkpoint again")
        )
    heard = alone if codes is None else codes
    sound = codec.decode(heard)
    if not np.isfinite(sound).all() or np.abs(sound).max() < 1e-4:
        message = f"{codec.name} makes silence or NaN of the dataset's codes"
        findings.append(
            Finding("bad", "codec", message, "its weights are broken: get the checkpoint again")
        )
    back = codec.encode([sound.astype(np.float32)])[0][: len(heard)] == heard
    return findings or [
        Finding(
            "ok",
            "codec",
            f"{codec.name} is the dataset's ({fingerprint}) and repeats itself; {back.mean():.0%}"
            " of codes survive a round trip",
        )
    ]


def examine_before_training(settings: Settings) -> None:
    """The quick part: prints what is not ok of a sample of the records. UserError if something is
    bad and data.doctor is "stop".
    """
    if settings.data.doctor == "off":
        return
    findings = [finding for finding in doctor(settings, sample=QUICK) if finding.severity != "ok"]
    for finding in findings if jax.process_index() == 0 else ():
        print(f"doctor: {finding}")
    bad = [finding for finding in findings if finding.severity == "bad"]
    if bad and settings.data.doctor == "stop":
        raise UserError(
            f"{bad[0].message}{'; ' + bad[0].fix if bad[0].fix else ''} (to train all the same, set"
            " data.doctor to warn)"
        )


def _some_codes(folder: str, split: str) -> np.ndarray:
    return np.asarray(open_utterances(folder, split)[0].codes)[:500]


def _clips(count: int, one: Scan) -> str:
    return f"{count:,} clip{'s' if count != 1 else ''}" + (
        f" of {len(one.ids):,} looked at" if one.is_sample else ""
    )


def _ids(ids: Iterable[str], most: int = 3) -> tuple[str, ...]:
    return tuple(row_id for row_id, _ in zip(ids, range(most), strict=False))
