"""One pass over a split, or over an even sample of it: the numbers that the doctor and the report
look at.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llasa_jax.errors import UserError
from llasa_jax.speech.prompts import Prompter, Utterance
from llasa_jax.speech.vocab import CODES_PER_SECOND, NUM_CODES

COUNTED_AT_ONCE = 1000


@dataclass(frozen=True)
class Scan:
    """Columns with one entry per record examined, of `size` records in all.

    `indices`, int (n,), are the places of those records in the split. `text_bytes`, `codes` and
    `distinct` are int (n,): the text's size in UTF-8, how many codes, how many different ones.
    `tokens`, int (n,), is the length of the whole example, -1 where the prompt refused the record;
    None where no tokenizer was given. `refused` has (id, reason). `text_digests` and `code_digests`
    are equal where text and codes are; `speaker_digests` are those of the speakers' names as texts.
    `repeated_texts` has the beginning of each text that occurs more than once. `usage`, int
    (65,536,), counts every code.
    """

    size: int
    indices: np.ndarray
    ids: list[str]
    speakers: list[str]
    languages: list[str]
    text_bytes: np.ndarray
    codes: np.ndarray
    distinct: np.ndarray
    tokens: np.ndarray | None
    refused: list[tuple[str, str]]
    text_digests: list[bytes]
    code_digests: list[bytes]
    speaker_digests: set[bytes]
    repeated_texts: dict[bytes, str]
    usage: np.ndarray

    @property
    def is_sample(self) -> bool:
        return len(self.ids) < self.size

    @property
    def seconds(self) -> np.ndarray:
        return self.codes / CODES_PER_SECOND


def check_sample(sample: int) -> None:
    """UserError for a sample that would have no records."""
    if sample < 1:
        raise UserError(f"the sample is {sample} clips; give a number from 1 on (--sample)")


def scan(records: Sequence[Utterance], sample: int, prompter: Prompter | None = None) -> Scan:
    """Looks at all records, or at `sample` of them, evenly spread. Memory holds about 250 bytes per
    record examined.
    """
    check_sample(sample)
    count = min(len(records), sample)
    numbers = np.zeros((count, 4), np.int64)
    ids: list[str] = []
    speakers: list[str] = []
    languages: list[str] = []
    refused: list[tuple[str, str]] = []
    text_digests: list[bytes] = []
    code_digests: list[bytes] = []
    seen: set[bytes] = set()
    repeated_texts: dict[bytes, str] = {}
    usage, waiting = np.zeros(NUM_CODES, np.int64), []
    indices = np.linspace(0, len(records) - 1, count, dtype=int)
    for row, index in enumerate(indices):
        utterance = records[int(index)]
        codes = np.asarray(utterance.codes)
        text = utterance.text.encode()
        digest = _digest(text)
        ids.append(utterance.id)
        speakers.append(utterance.speaker)
        languages.append(utterance.language)
        text_digests.append(digest)
        if digest in seen:
            repeated_texts.setdefault(digest, utterance.text[:40])
        seen.add(digest)
        code_digests.append(_digest(codes.astype(np.int64).tobytes()))
        length = -1
        if prompter is not None:
            try:
                length = len(prompter.example(utterance).tokens)
            except UserError as error:
                refused.append((utterance.id, str(error)))
        numbers[row] = len(text), len(codes), len(np.unique(codes)), length
        waiting.append(codes[(codes >= 0) & (codes < NUM_CODES)].astype(np.uint16))
        if len(waiting) == COUNTED_AT_ONCE or row == count - 1:
            usage += np.bincount(np.concatenate(waiting), minlength=NUM_CODES)
            waiting = []
    text_bytes, code_counts, distinct, tokens = numbers.T
    return Scan(
        size=len(records),
        indices=indices,
        ids=ids,
        speakers=speakers,
        languages=languages,
        text_bytes=text_bytes,
        codes=code_counts,
        distinct=distinct,
        tokens=None if prompter is None else tokens,
        refused=refused,
        text_digests=text_digests,
        code_digests=code_digests,
        speaker_digests={_digest(name.encode()) for name in set(speakers) - {""}},
        repeated_texts=repeated_texts,
        usage=usage,
    )


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=12).digest()


def repeated_codes(scans: Sequence[Scan]) -> list[list[tuple[int, int]]]:
    """Groups of records with the same codes, each record as (index of its scan, index in it)."""
    first: dict[bytes, tuple[int, int]] = {}
    groups: dict[bytes, list[tuple[int, int]]] = {}
    for at, scan in enumerate(scans):
        for row, digest in enumerate(scan.code_digests):
            if first.setdefault(digest, (at, row)) != (at, row):
                groups.setdefault(digest, [first[digest]]).append((at, row))
    return list(groups.values())


def suspicious_pace(scans: Sequence[Scan]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """For each scan, the rows with far too many codes for their text, and those with far too few,
    ascending.

    Measured against the median codes per byte of the record's language: more than three times that
    and three seconds over is too many, under a third of it and a second short is too few. A
    language with few records is measured against all of them.
    """
    languages = np.concatenate([np.array(scan.languages, object) for scan in scans])
    codes = np.concatenate([scan.codes for scan in scans])
    text_bytes = np.concatenate([scan.text_bytes for scan in scans])
    pace = codes / np.maximum(text_bytes, 1)
    expected = np.median(pace) * text_bytes
    for language in set(languages):
        same = languages == language
        if same.sum() >= 30:
            expected[same] = np.median(pace[same]) * text_bytes[same]
    ends = np.cumsum([len(scan.ids) for scan in scans])[:-1]
    many = np.split(codes > 3 * expected + 3 * CODES_PER_SECOND, ends)
    few = np.split(3 * codes + CODES_PER_SECOND < expected, ends)
    return [np.flatnonzero(part) for part in many], [np.flatnonzero(part) for part in few]
