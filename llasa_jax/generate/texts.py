"""Texts before they are spoken: numbers written out, and long ones cut between sentences."""

import logging
import os
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from llasa_jax.errors import UserError
from llasa_jax.generate.decode import reading_seconds

# The languages for which NeMo has grammars of text normalization.
LANGUAGES = (
    *("ar", "de", "en", "es", "fr", "hi", "hu", "hy", "it"),
    *("ja", "ko", "pt", "ru", "rw", "sv", "vi", "zh"),
)
# Where a sentence that is too long may be cut, best first.
CUTS = (r"(?<=[;:；：])\s*", r"(?<=[,，、])\s*", r"\s+")


def normalize(text: str, language: str) -> str:
    """`text` with numbers, dates, units and abbreviations as words, by NVIDIA NeMo's grammars (the
    extra `normalize`). The grammars of a language are compiled once, which takes minutes, and kept
    in `~/.cache/llasa_jax/normalize`.

    Raises UserError for a language without grammars, and where the extra is not installed.
    """
    if language not in LANGUAGES:
        raise UserError(
            f"texts in {language!r} cannot be normalized; choose one of {', '.join(LANGUAGES)}, or"
            " leave normalize empty"
        )
    return _normalizer(language).normalize(text, verbose=False)


@lru_cache(maxsize=4)
def _normalizer(language: str):
    try:
        from nemo_text_processing.text_normalization.normalize import Normalizer
    except ImportError:
        raise UserError(
            "writing numbers out needs NeMo's text processing; install it with"
            ' `pip install "llasa-jax[normalize]"`, or leave normalize empty'
        ) from None
    logging.getLogger("NeMo-text-processing").setLevel(logging.ERROR)
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    cache = cache / "llasa_jax" / "normalize"
    cache.mkdir(parents=True, exist_ok=True)
    return Normalizer(input_case="cased", lang=language, cache_dir=str(cache))


def cut(text: str, seconds: float, language: str = "") -> list[str]:
    """`text` in pieces, each of which takes at most `seconds` to read: one or more sentences, and
    where a sentence is too long, parts of it. A single word is never cut.
    """
    if reading_seconds(text) <= seconds:
        return [text]
    from sentencex import segment  # only for long texts: it takes a second to load

    pieces = [""]
    for part in _parts(segment(language or "en", text), seconds):
        if pieces[-1].strip() and reading_seconds((pieces[-1] + part).strip()) > seconds:
            pieces.append("")
        pieces[-1] += part
    return [piece.strip() for piece in pieces if piece.strip()]


def _parts(parts, seconds: float, cuts: tuple[str, ...] = CUTS) -> Iterator[str]:
    for part in parts:
        if not cuts or reading_seconds(part.strip()) <= seconds:
            yield part
        else:
            ends = [0, *(match.end() for match in re.finditer(cuts[0], part)), len(part)]
            smaller = [part[a:b] for a, b in zip(ends, ends[1:], strict=False) if b > a]
            yield from _parts(smaller, seconds, cuts[1:])
