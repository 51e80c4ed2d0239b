"""Looks for what has cost people weeks: broken codes, copied or leaking clips, texts of other
clips, the wrong tokenizer or codec.

Each check returns findings; those that are ok say what was examined, so that silence is never taken
for health.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llasa_jax.codec import Codec
from llasa_jax.convert.model_folder import load_tokenizer
from llasa_jax.data.builder import read_metadata
from llasa_jax.data.records import open_utterances
from llasa_jax.data.settings import SourceSettings
from llasa_jax.encode.mixture import codec_of, open_sources
from llasa_jax.encode.settings import DataSettings
from llasa_jax.errors import UserError
from llasa_jax.inspect.findings import Finding
from llasa_jax.inspect.model_checks import check_codec, check_tokenizer
from llasa_jax.inspect.record_checks import check_scans
from llasa_jax.inspect.scan import check_sample, scan
from llasa_jax.runtime.storage import as_path
from llasa_jax.speech.prompts import Prompter
from llasa_jax.train.progress import say
from llasa_jax.train.settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QUICK = 2_000  # records of each split that are examined before training: about a second
THOROUGH = 200_000  # and by the command: minutes
HEADERS = 500  # of audio files: a second on a local disk

# Training and validation records of each source, as `open_sources` gives them.
Opened = tuple[Sequence[Sequence], Sequence[Sequence | None]]


def doctor(
    settings: Settings,
    codec: str | Path | Codec | None = None,
    device: str = "cpu",
    sample: int = THOROUGH,
    opened: Opened | None = None,
) -> list[Finding]:
    """Examines what `train` would train on, at most `sample` records of each split.

    `codec`, a loaded one or a name for `load_codec(codec, device)`, is examined too if given.
    `opened` are the datasets, where they are open already. Raises UserError for a `sample` below 1
    only; any other error of the user is a finding.
    """
    check_sample(sample)
    findings: list[Finding] = []
    tokenizer = None
    model = as_path(settings.model.path)
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
    for i, source in enumerate(settings.sources):
        splits: dict[str, Sequence | None] = {}
        if opened:
            splits = {source.validation_split: opened[1][i], source.split: opened[0][i]}
        if source.mode == "online":
            findings += _examine_audio(source, settings.data, tokenizer, splits)
        elif not source.is_chat:
            findings += _examine_source(
                source, settings.data, tokenizer, codec, device, sample, splits
            )
    return findings


def examine_before_training(settings: Settings, opened: Opened | None = None) -> None:
    """The quick part, on the datasets as `open_sources` gives them: prints what is not ok in a
    sample of the records. UserError if something is bad and data.doctor is "stop".
    """
    if settings.data.doctor == "off":
        return
    every = doctor(settings, sample=QUICK, opened=opened)
    findings = [finding for finding in every if finding.severity != "ok"]
    for finding in findings:
        say(f"doctor: {finding}")
    bad = [finding for finding in findings if finding.severity == "bad"]
    if bad and settings.data.doctor == "stop":
        fix = f"; {bad[0].fix}" if bad[0].fix else ""
        raise UserError(f"{bad[0].message}{fix} (to train all the same, set data.doctor to warn)")


def _examine_audio(
    source: SourceSettings,
    data: DataSettings,
    tokenizer: "PreTrainedTokenizerBase | None",
    opened: dict[str, Sequence | None],
) -> list[Finding]:
    """A source that is encoded while training, so that it has no codes yet: its texts, and the
    headers of some of its audio.
    """
    try:
        clips = opened.get(source.split) or open_sources([source], data.online)[0][0]
        examined = [clips[int(i)] for i in np.linspace(0, len(clips) - 1, min(len(clips), HEADERS))]
        readable = [clip for clip in examined if clip is not None]
        if tokenizer:
            prompter = Prompter(tokenizer, source.prompt)
            for clip in readable:
                prompter.plan(clip)
    except UserError as error:
        return [Finding("bad", "audio", str(error))]
    unreadable = 1 - len(readable) / len(examined)
    message = (
        f"{source.path} is encoded while training: its codes cannot be examined before,"
        f" {len(examined):,} of {len(clips):,} headers were"
    )
    if not unreadable:
        return [Finding("ok", "audio", message)]
    fix = "fix the clips that the warnings name, or take them out"
    if unreadable > data.online.max_bad_share:
        message += f", and {unreadable:.0%} of them cannot be read"
        return [Finding("bad", "audio", message, fix)]
    return [Finding("warn", "audio", message, fix)]


def _examine_source(
    source: SourceSettings,
    data: DataSettings,
    tokenizer: "PreTrainedTokenizerBase | None",
    codec: str | Path | Codec | None,
    device: str,
    sample: int,
    opened: dict[str, Sequence | None],
) -> list[Finding]:
    """One dataset of codes: its records, and the codec that made them."""
    findings, scans = [], {}
    prompter = None
    try:
        prompter = Prompter(tokenizer, source.prompt) if tokenizer else None
    except UserError as error:
        findings.append(Finding("bad", "tokenizer", str(error)))
    for split in dict.fromkeys(filter(None, (source.split, source.validation_split))):
        try:
            records = opened.get(split) or open_utterances(source.path, split)
            scans[split] = scan(records, sample, prompter)
        except UserError as error:
            findings.append(Finding("bad", "split", str(error)))
    if not scans:
        return findings
    examined = ", ".join(
        f"{len(records.ids):,} of {records.size:,} clips of {split}"
        for split, records in scans.items()
    )
    findings.append(Finding("ok", "records", f"looked at {examined} in {source.path}"))
    findings += check_scans(scans, data.max_length, data.too_long)
    split = next(iter(scans))
    records = opened.get(split) or open_utterances(source.path, split)
    codes = np.asarray(records[0].codes)[:500]
    return findings + check_codec(read_metadata(source.path), codec, device, codes)
