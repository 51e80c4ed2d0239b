"""The speech half of the vocabulary: eight markers, then one token for each of XCodec2's 65,536
codes.

Upstream (LLaSA_training, train_tts.py) adds them after the text tokenizer's own tokens, as plain
added tokens, in exactly this order. The first id depends on the text tokenizer, so it is always
read from there.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from llasa_jax.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NUM_CODES = 65_536
CODES_PER_SECOND = 50
TEXT_GENERATION = ("<|TEXT_GENERATION_START|>", "<|TEXT_GENERATION_END|>")
TEXT_UNDERSTANDING = ("<|TEXT_UNDERSTANDING_START|>", "<|TEXT_UNDERSTANDING_END|>")
SPEECH_GENERATION = ("<|SPEECH_GENERATION_START|>", "<|SPEECH_GENERATION_END|>")
SPEECH_UNDERSTANDING = ("<|SPEECH_UNDERSTANDING_START|>", "<|SPEECH_UNDERSTANDING_END|>")
MARKERS = TEXT_GENERATION + TEXT_UNDERSTANDING + SPEECH_GENERATION + SPEECH_UNDERSTANDING

# How Llama 3 cuts text into words before byte-pair merges.
LLAMA_3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def code_token(code: int) -> str:
    return f"<|s_{code}|>"


def extend_tokenizer(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Adds the speech vocabulary to a text tokenizer, in place. Does nothing to one that has it;
    UserError if it has parts of it.
    """
    vocab = tokenizer.get_vocab()
    if any(token in vocab for token in (*MARKERS, code_token(0), code_token(NUM_CODES - 1))):
        SpeechVocab.of(tokenizer)
        return
    tokenizer.add_tokens([*MARKERS, *map(code_token, range(NUM_CODES))])


@dataclass(frozen=True)
class SpeechVocab:
    """The ids of the speech tokens in one tokenizer. Code c is token `code_base + c`."""

    markers: dict[str, int]
    code_base: int
    size: int

    @classmethod
    def of(cls, tokenizer: "PreTrainedTokenizerBase") -> "SpeechVocab":
        """Reads the ids, and refuses (UserError) a tokenizer without the speech tokens, or with
        them out of upstream's order.
        """
        vocab = tokenizer.get_vocab()
        name = tokenizer.name_or_path or "the tokenizer"
        missing = [token for token in MARKERS if token not in vocab]
        if len(missing) == len(MARKERS):
            raise UserError(
                f"the tokenizer {name} has no speech tokens; use Llasa's own tokenizer, or import"
                " the text model with --extend-vocab"
            )
        expected = [*MARKERS, *map(code_token, range(NUM_CODES))]
        first = vocab.get(MARKERS[0], 0)
        for offset, token in enumerate(expected):
            if vocab.get(token) != first + offset:
                found = f"has id {vocab[token]}" if token in vocab else "is missing"
                raise UserError(
                    f"the tokenizer {name} was extended differently from Llasa's: {token} should"
                    f" have id {first + offset} but {found}; use Llasa's own tokenizer, or start"
                    " from the text model's with --extend-vocab"
                )
        return cls(
            {token: first + i for i, token in enumerate(MARKERS)},
            first + len(MARKERS),
            len(tokenizer),
        )

    @property
    def speech_start(self) -> int:
        return self.markers[SPEECH_GENERATION[0]]

    @property
    def speech_end(self) -> int:
        return self.markers[SPEECH_GENERATION[1]]

    def ids_of(self, codes: np.ndarray) -> np.ndarray:
        """Token ids (int32) of codes. ValueError on a code outside 0..65,535, above all on ids
        passed as codes.
        """
        codes = np.asarray(codes).astype(np.int64)
        if codes.size and (codes.min() < 0 or codes.max() >= NUM_CODES):
            bad = codes[(codes < 0) | (codes >= NUM_CODES)][0]
            raise ValueError(f"code {bad} is outside 0..{NUM_CODES - 1}")
        return (codes + self.code_base).astype(np.int32)

    def codes_of(self, ids: np.ndarray) -> np.ndarray:
        """The codes (uint16) among `ids`; markers and text are left out."""
        ids = np.asarray(ids).astype(np.int64) - self.code_base
        return ids[(ids >= 0) & (ids < NUM_CODES)].astype(np.uint16)
