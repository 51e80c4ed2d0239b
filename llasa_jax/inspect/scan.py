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

LOOKED_AT_ONCE = 1000


@dataclass(frozen=True)
class Scan:
    """Columns with one entry a record looked at, of `size` records in all.

    `indices`, int (n,), are the places of those records in the split. `text_bytes`, `codes` and
    `distinct` are int (n,): the text's size in UTF-8, how many codes, how many different ones.
    `tokens`, int (n,), is the length of the whole example, -1 where the prompt refused the record;
    None where no tokenizer was given. `refused` has (id, reason). `text_digests` and `code_digests`
    are equal where text and codes are. `usage`, int (65,536,), counts every code.
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
    usage: np.ndarray

    @property
    def is_sample(self) -> bool:
        return len(self.ids) < self.size

    @property
    def seconds(self) -> np.ndarray:
        return self.codes / CODES_PER_SECOND


def scan(records: Sequence[Utterance], sample: int, prompter: Prompter | None = None) -> Scan:
    """Looks at all records, or at `sample` of them, evenly spread. Memory holds about 250 bytes a
    record looked at.
    """
    count = min(len(records), sample)
    numbers = np.zeros((count, 4), np.int64)
    ids, speakers, languages, refused, text_digests, code_digests = [], [], [], [], [], []
    usage, waiting = np.zeros(NUM_CODES, np.int64), []
    indices = np.linspace(0, len(records) - 1, count, dtype=int)
    for row, index in enumerate(indices):
        utterance = records[int(index)]
        codes = np.asarray(utterance.codes)
        valid = codes[(codes >= 0) & (codes < NUM_CODES)].astype(np.uint16)
        text = utterance.text.encode()
        ids.append(utterance.id)
        speakers.append(utterance.speaker)
        languages.append(utterance.language)
        text_digests.append(hashlib.blake2b(text, digest_size=12).digest())
        code_digests.append(
            hashlib.blake2b(codes.astype(np.int64).tobytes(), digest_size=12).digest()
        )
        tokens = -1
        if prompter is not None:
            try:
                tokens = len(prompter.example(utterance).tokens)
            except UserError as error:
                refused.append((utterance.id, str(error)))
        numbers[row] = len(text), len(codes), len(np.unique(codes)), tokens
        waiting.append(valid)
        if len(waiting) == LOOKED_AT_ONCE or row == count - 1:
            usage += np.bincount(np.concatenate(waiting), minlength=NUM_CODES)
            waiting = []
    text_bytes, lengths, distinct, tokens = numbers.T
    return Scan(
        len(records),
        indices,
        ids,
        speakers,
        languages,
        text_bytes,
        lengths,
        distinct,
        None if prompter is None else tokens,
        refused,
        text_digests,
        code_digests,
        usage,
    )


def repeated_codes(scans: Sequence[Scan]) -> list[list[tuple[int, int]]]:
    """Groups of records with the very same codes, each record as (scan, row)."""
    first: dict[bytes, tuple[int, int]] = {}
    groups: dict[bytes, list[tuple[int, int]]] = {}
    for at, one in enumerate(scans):
        for row, digest in enumerate(one.code_digests):
            if first.setdefault(digest, (at, row)) != (at, row):
                groups.setdefault(digest, [first[digest]]).append((at, row))
    return list(groups.values())


def suspicious_pace(scans: Sequence[Scan]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """For each scan, the rows with far too many codes for their text, and those with far too few,
    ascending.

    Measured against the median codes a byte of the record's language: more than three times that
    and three seconds over is too many, under a third of it and a second short is too few. A
    language with few records is measured against all of them.
    """
    languages = np.concatenate([np.array(one.languages, object) for one in scans])
    codes = np.concatenate([one.codes for one in scans])
    text_bytes = np.concatenate([one.text_bytes for one in scans])
    pace = codes / np.maximum(text_bytes, 1)
    expected = np.median(pace) * text_bytes
    for language in set(languages):
        mine = languages == language
        if mine.sum() >= 30:
            expected[mine] = np.median(pace[mine]) * text_bytes[mine]
    ends = np.cumsum([len(one.ids) for one in scans])[:-1]
    many = np.split(codes > 3 * expected + 3 * CODES_PER_SECOND, ends)
    few = np.split(3 * codes + CODES_PER_SECOND < expected, ends)
    return [np.flatnonzero(part) for part in many], [np.flatnonzero(part) for part in few]
