"""From an utterance to token ids: the one place where a prompt is put together, for training and for inference alike.

Upstream's layout (LLaSA_training, finetune_offline.py), through the tokenizer's own chat template:

    user       Convert the text to speech:<|TEXT_UNDERSTANDING_START|>{text}<|TEXT_UNDERSTANDING_END|>
    assistant  <|SPEECH_GENERATION_START|>{codes}<|SPEECH_GENERATION_END|>

The text is tokenised on its own, so that no merge crosses a marker, and is not trimmed. With a speaker the assistant's turn begins
with "Speaker {name}", directly before the start marker. Loss is on the start marker, every code and the end marker.
"""

import string
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

import numpy as np

from llasa_jax.errors import UserError
from llasa_jax.vocab import SPEECH_GENERATION, TEXT_UNDERSTANDING, SpeechVocab

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Utterance:
    """A spoken sentence. `codes` are XCodec2's, 50 a second; fields that a record lacks are empty."""

    text: str
    codes: np.ndarray
    id: str = ""
    speaker: str = ""
    description: str = ""
    language: str = ""


@dataclass(frozen=True)
class Example:
    """An utterance as the model sees it: three arrays of one length.

    `tokens` int32; `loss` bool, true on the tokens that are to be predicted; `visible` bool, false on those that no other may
    attend to.
    """

    tokens: np.ndarray
    loss: np.ndarray
    visible: np.ndarray


@dataclass(frozen=True)
class PromptSettings:
    """The wording of a prompt. Templates may name any of text, codes, speaker, description, language.

    `assistant_with_speaker` takes the place of `assistant` for utterances that name a speaker. `date` fills the chat template's
    "Today Date", so that no prompt depends on the day it is made. `mask` "clean" shows all of the prompt, as at inference; "upstream" hides
    every <|eot_id|> from attention, as upstream's training does by padding with it.
    """

    user: str = "Convert the text to speech:{text}"
    assistant: str = "{codes}"
    assistant_with_speaker: str = "Speaker {speaker}{codes}"
    system: str = ""
    date: str = "26 Jul 2024"
    mask: Literal["clean", "upstream"] = "clean"

    def __post_init__(self):
        known = {field.name for field in fields(Utterance)} - {"id"}
        for name in ("system", "user", "assistant", "assistant_with_speaker"):
            for field in _fields_of(getattr(self, name)):
                if field not in known:
                    raise UserError(f"prompt.{name} mentions {{{field}}}, which no utterance has; use any of {', '.join(sorted(known))}")
        if "codes" not in _fields_of(self.assistant) or "codes" not in _fields_of(self.assistant_with_speaker):
            raise UserError("prompt.assistant and prompt.assistant_with_speaker must each contain {codes}, the speech to learn")


def _fields_of(template: str) -> list[str]:
    return [field for _, field, _, _ in string.Formatter().parse(template) if field is not None]


class Prompter:
    """Builds prompts with one tokenizer. Raises UserError where the tokenizer lacks the speech tokens or a chat template."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", settings: PromptSettings | None = None):
        if tokenizer.chat_template is None:
            raise UserError(
                f"the tokenizer {tokenizer.name_or_path} has no chat template; use that of a Llama Instruct or Llasa checkpoint"
            )
        self.vocab = SpeechVocab.of(tokenizer)
        self.settings = settings or PromptSettings()
        self._tokenizer = tokenizer
        self._hidden = tokenizer.convert_tokens_to_ids("<|eot_id|>") if self.settings.mask == "upstream" else None
        self._control = frozenset(tokenizer.all_special_ids)
        self._frame = lru_cache(maxsize=4096)(self._make_frame)

    def example(self, utterance: Utterance) -> Example:
        """The training example of an utterance: its whole conversation. UserError names the utterance's id."""
        tokens, start = self._tokens(utterance)
        if not len(utterance.codes):
            raise UserError(f"the utterance {utterance.id!r} has no codes; leave it out of the dataset")
        loss = np.zeros(len(tokens), bool)
        loss[start : start + len(utterance.codes) + 2] = True
        visible = np.ones(len(tokens), bool) if self._hidden is None else tokens != self._hidden
        return Example(tokens, loss, visible)

    def opening(self, text: str, *, speaker: str = "", description: str = "", prompt_text: str = "", prompt_codes=()) -> np.ndarray:
        """The ids (int32) that inference goes on from: all before the first code, then `prompt_codes`, a voice to clone.

        `prompt_text` is what `prompt_codes` say; the model reads it before `text`, as if both were one sentence.
        """
        text = join_texts(prompt_text, text)
        codes = np.asarray(prompt_codes, np.uint16)
        tokens, start = self._tokens(Utterance(text=text, codes=codes, speaker=speaker, description=description))
        return tokens[: start + 1 + len(codes)]

    def _tokens(self, utterance: Utterance) -> tuple[np.ndarray, int]:
        """All ids of the conversation, and where the speech's start marker stands."""
        settings = self.settings
        name = f"the utterance {utterance.id!r}" if utterance.id else f"the text {utterance.text!r}"
        if not utterance.text.strip():
            raise UserError(f"{name} has no text; give it one or leave it out of the dataset")
        assistant = settings.assistant_with_speaker if utterance.speaker else settings.assistant
        values = {"speaker": utterance.speaker, "description": utterance.description, "language": utterance.language}
        for field in _fields_of(settings.system + settings.user + assistant):
            if not values.get(field, "text and codes are spliced in"):
                raise UserError(f"{name} has no {field}, which the prompt mentions; add it to the record or change the prompt's template")
        frame, text_at, codes_at = self._frame(assistant, **values)
        text_ids = self._tokenizer(utterance.text, add_special_tokens=False)["input_ids"]
        for token in text_ids:
            if token in self._control or token >= self.vocab.code_base - len(self.vocab.markers):
                control = self._tokenizer.convert_ids_to_tokens(token)
                raise UserError(f"{name} contains the control token {control}, which would break the prompt; take it out of the text")
        try:
            codes = self.vocab.ids_of(utterance.codes)
        except ValueError as error:
            raise UserError(f"{name}: {error}; codes are XCodec2's own numbers, without the vocabulary's offset") from None
        pieces = sorted([(text_at, np.asarray(text_ids, np.int32)), (codes_at, codes)], key=lambda piece: piece[0])
        (first_at, first), (second_at, second) = pieces
        tokens = np.concatenate([frame[:first_at], first, frame[first_at:second_at], second, frame[second_at:]])
        return tokens, codes_at - 1 + (len(text_ids) if text_at < codes_at else 0)

    def _make_frame(self, assistant: str, **values: str) -> tuple[np.ndarray, int, int]:
        """The conversation with nothing between its markers, and where in it the text's and the speech's ids belong."""
        settings = self.settings
        values |= {"text": "".join(TEXT_UNDERSTANDING), "codes": "".join(SPEECH_GENERATION)}
        messages = [{"role": "system", "content": settings.system.format(**values)}] if settings.system else []
        messages += [
            {"role": "user", "content": settings.user.format(**values)},
            {"role": "assistant", "content": assistant.format(**values)},
        ]
        rendered = self._tokenizer.apply_chat_template(messages, tokenize=False, date_string=settings.date)
        frame = np.asarray(self._tokenizer(rendered, add_special_tokens=False)["input_ids"], np.int32)
        places = []
        for start, _ in (TEXT_UNDERSTANDING, SPEECH_GENERATION):
            at = np.flatnonzero(frame == self.vocab.markers[start])
            if len(at) != 1:
                raise UserError(f"the prompt's templates must put {start} into the conversation once, but it stands there {len(at)} times")
            places.append(int(at[0]) + 1)
        return frame, *places


def join_texts(first: str, second: str) -> str:
    """Two texts as one, with a space between them where the script in use has spaces."""
    needs_space = first and second and first[-1].isascii() and second[0].isascii() and not (first[-1].isspace() or second[0].isspace())
    return first + (" " if needs_space else "") + second
