"""From a record to token ids: the one place where a prompt is put together, for training and for
inference alike.

A prompt is a chat in the tokenizer's own template, whose turns are templates that the config may
word otherwise. Three tasks:

tts   user       Convert the text to
speech:<|TEXT_UNDERSTANDING_START|>{text}<|TEXT_UNDERSTANDING_END|>
          assistant  <|SPEECH_GENERATION_START|>{codes}<|SPEECH_GENERATION_END|>
asr   user       Transcribe the following
speech:<|SPEECH_UNDERSTANDING_START|>{codes}<|SPEECH_UNDERSTANDING_END|>
          assistant  <|TEXT_GENERATION_START|>{text}<|TEXT_GENERATION_END|>
    chat  the record's own messages, as they are

tts is upstream's layout (LLaSA_training, finetune_offline.py); upstream names asr's markers but
trains nothing with them. Text is tokenised on its own, so that no merge crosses a marker, and is
not trimmed. With a speaker, tts's assistant begins with "Speaker {name}", directly before the start
marker. Loss is on what the assistant says: in tts and asr from its start marker to its end marker;
in chat on every assistant's turn and the <|eot_id|> that ends it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from llasa_jax.errors import UserError
from llasa_jax.speech.chat_template import ChatTemplate
from llasa_jax.speech.settings import LEARNED, PromptSettings, fields_of
from llasa_jax.speech.vocab import (
    SPEECH_GENERATION,
    SPEECH_UNDERSTANDING,
    TEXT_GENERATION,
    TEXT_UNDERSTANDING,
    SpeechVocab,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What stands around {text} and {codes}.
_MARKERS = {
    "tts": {"text": TEXT_UNDERSTANDING, "codes": SPEECH_GENERATION},
    "asr": {"text": TEXT_GENERATION, "codes": SPEECH_UNDERSTANDING},
}

MAX_FIELD = 2000  # characters of a speaker, a description or a language

# Stands for a code that is not made yet, in the tokens of a planned example. No token has this id.
NOT_ENCODED = -1


@dataclass(frozen=True)
class Utterance:
    """A spoken sentence. `codes` are XCodec2's, uint16 (num_codes,), 50 per second; None where the
    audio is not encoded yet. `num_codes` then says how many there will be, 0 if that is not known.
    Absent texts are empty.
    """

    text: str
    codes: np.ndarray | None
    id: str = ""
    speaker: str = ""
    description: str = ""
    language: str = ""
    num_codes: int = 0

    def __post_init__(self):
        if self.codes is not None:
            object.__setattr__(self, "num_codes", len(self.codes))


@dataclass(frozen=True)
class Conversation:
    """A written exchange: dicts of `role` (system, user or assistant) and `content`, in order."""

    messages: Sequence[dict[str, str]]
    id: str = ""


@dataclass(frozen=True)
class Pair:
    """Two speeches of one text, of which `better` is to become more probable.

    Both begin with the same `prompt` codes, a voice to clone, without loss. `stopped` says which
    of them the model ended by itself; the others have no loss on the end marker. `reference` are
    their log-probabilities in the reference model, nats, where they are known.
    """

    better: Utterance
    worse: Utterance
    prompt: int = 0
    stopped: tuple[bool, bool] = (True, True)
    reference: tuple[float, float] | None = None

    @property
    def id(self) -> str:
        return self.better.id


@dataclass(frozen=True)
class Example:
    """A record as the model sees it: three arrays of one length.

    `tokens` int32; `loss` bool, true on the tokens that are to be predicted; `visible` bool, false
    on those that no other may attend to. Where it is several sequences, none of which sees another,
    `lengths` are theirs. `values` are further numbers of the tokens that some losses take, float32.
    """

    tokens: np.ndarray
    loss: np.ndarray
    visible: np.ndarray
    lengths: tuple[int, ...] = ()
    values: Mapping[str, np.ndarray] | None = None

    @property
    def lacks_codes(self) -> bool:
        """Whether it is only planned: tokens are missing that the codec has yet to make."""
        return bool((self.tokens == NOT_ENCODED).any())


class Prompter:
    """Builds prompts with one tokenizer. Raises UserError where the tokenizer lacks the speech
    tokens or a chat template.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", settings: PromptSettings | None = None
    ):
        self.settings = (settings or PromptSettings()).filled()
        self._template = ChatTemplate(tokenizer, self.settings.date)
        self.vocab = SpeechVocab.of(tokenizer)
        self._tokenizer = tokenizer
        self._hidden = (
            tokenizer.convert_tokens_to_ids("<|eot_id|>")
            if self.settings.mask == "upstream"
            else None
        )
        self._frame = lru_cache(maxsize=4096)(self._make_frame)

    def example(self, record: Utterance | Conversation) -> Example:
        """The training example of a record: its whole conversation.

        The task chat takes a `Conversation`, the others an `Utterance`. Raises UserError, naming
        the record's id, where a prompt cannot be made of it, and where it is not encoded yet.
        """
        example = self.plan(record)
        if example.lacks_codes:
            raise UserError(
                f"the utterance {record.id!r} is not encoded yet; train with data.mode=online, or"
                " encode it first with `llasa-jax encode`"
            )
        return example

    def plan(self, record: Utterance | Conversation | Pair) -> Example:
        """As `example`, but a record that is not encoded yet gives NOT_ENCODED in place of each
        token of its codes, for `with_codes` to replace.
        """
        if isinstance(record, Pair):
            return self._pair(record)
        assert isinstance(record, Conversation) == (self.settings.task == "chat")
        if isinstance(record, Conversation):
            tokens, loss = self._chat(record)
        else:
            if not record.num_codes:
                raise UserError(
                    f"the utterance {record.id!r} has no codes; leave it out of the dataset"
                )
            tokens, start, size = self._speech(record)
            loss = np.zeros(len(tokens), bool)
            loss[start : start + size + 2] = True
        visible = np.ones(len(tokens), bool) if self._hidden is None else tokens != self._hidden
        return Example(tokens, loss, visible)

    def _pair(self, pair: Pair) -> Example:
        """The better speech, then the worse one."""
        parts, reference = [], []
        for at, utterance in enumerate((pair.better, pair.worse)):
            part = self.plan(utterance)
            learned = np.flatnonzero(part.loss)
            if pair.prompt:
                part.loss[learned[: 1 + pair.prompt]] = False
            if not pair.stopped[at]:
                part.loss[learned[-1]] = False
            parts.append(part)
            reference.append(np.zeros(len(part.tokens), np.float32))
            if pair.reference:  # at the last token with loss (see `DpoLoss`)
                reference[at][np.flatnonzero(part.loss)[-1]] = pair.reference[at]
        return Example(
            np.concatenate([part.tokens for part in parts]),
            np.concatenate([part.loss for part in parts]),
            np.concatenate([part.visible for part in parts]),
            tuple(len(part.tokens) for part in parts),
            {"reference": np.concatenate(reference)} if pair.reference else None,
        )

    def length(self, record: Utterance | Conversation | Pair) -> int:
        """How many tokens the example of a record has, encoded or not."""
        return len(self.plan(record).tokens)

    def with_codes(self, example: Example, codes: np.ndarray) -> Example:
        """A planned example with its codes, integers (num_codes,): what `example` gives of the
        encoded record. Of an example that was cut, the codes that are left.
        """
        tokens = example.tokens.copy()
        places = np.flatnonzero(tokens == NOT_ENCODED)
        tokens[places] = self.vocab.ids_of(codes)[: len(places)]
        return replace(example, tokens=tokens)

    def opening(
        self,
        text: str,
        *,
        speaker: str = "",
        description: str = "",
        language: str = "",
        prompt_text: str = "",
        prompt_codes=(),
    ) -> np.ndarray:
        """The ids (int32) that speaking goes on from: all before the first code, then
        `prompt_codes`, a voice to clone.

        `prompt_text` is what `prompt_codes` say; the model reads it before `text`, as if both were
        one sentence. UserError where the prompts are those of another task than tts, and for a
        speaker, description or language that they do not mention.
        """
        if self.settings.task != "tts":
            raise UserError(
                f"this model was trained with prompt.task {self.settings.task}, which does not"
                " speak; use one trained with tts"
            )
        settings = self.settings
        assistant = settings.assistant_with_speaker if speaker else settings.assistant
        mentioned = fields_of(settings.system + settings.user + assistant)
        given = {"speaker": speaker, "description": description, "language": language}
        for field, value in given.items():
            if value and field not in mentioned:
                raise UserError(
                    f"the {field} {value!r:.80} would change nothing: the prompts that the model"
                    f" was trained with mention no {field}; leave it out"
                )
        text = join_texts(prompt_text, text)
        codes = np.asarray(prompt_codes, np.uint16)
        tokens, start, _ = self._speech(
            Utterance(text, codes, speaker=speaker, description=description, language=language)
        )
        return tokens[: start + 1 + len(codes)]

    def _speech(self, utterance: Utterance) -> tuple[np.ndarray, int, int]:
        """All ids of the conversation, where the start marker of what is learned stands, and how
        many ids lie between its markers.
        """
        settings = self.settings
        name = (
            f"the utterance {utterance.id!r:.200}"
            if utterance.id
            else f"the text {utterance.text!r:.200}"
        )
        if not utterance.text.strip():
            raise UserError(f"{name} has no text; give it one or leave it out of the dataset")
        assistant = settings.assistant_with_speaker if utterance.speaker else settings.assistant
        mentioned = dict.fromkeys(fields_of(settings.system + settings.user + assistant))
        values = {
            field: getattr(utterance, field)
            for field in mentioned
            if field not in _MARKERS[settings.task]
        }
        for field, value in values.items():
            if not value:
                raise UserError(
                    f"{name} has no {field}, which the prompt mentions; add it to the record or"
                    " change the prompt's template"
                )
            if len(value) > MAX_FIELD:
                raise UserError(
                    f"{name} has a {field} of {len(value):,} characters, more than {MAX_FIELD:,};"
                    " shorten it"
                )
        for value in (utterance.text, *values.values()):
            self._template.refuse_control(name, value)
        rendered, frame, places = self._frame(assistant, **values)
        plain, *_ = self._frame(assistant, **dict.fromkeys(values, "x"))
        self._template.refuse_joined_control(name, rendered, plain)
        try:
            codes = (
                np.full(utterance.num_codes, NOT_ENCODED, np.int32)
                if utterance.codes is None
                else self.vocab.ids_of(utterance.codes)
            )
        except ValueError as error:
            raise UserError(
                f"{name}: {error}; codes are XCodec2's own numbers, without the vocabulary's offset"
            ) from None
        ids = {"text": self._ids(utterance.text), "codes": codes}
        (first_at, first), (second_at, second) = sorted(
            (places[field], ids[field]) for field in ids
        )
        tokens = np.concatenate(
            [frame[:first_at], first, frame[first_at:second_at], second, frame[second_at:]]
        )
        learned = LEARNED[settings.task]
        start = places[learned] - 1 + (len(first) if places[learned] == second_at else 0)
        return tokens, start, len(ids[learned])

    def _make_frame(self, assistant: str, **values: str) -> tuple[str, np.ndarray, dict[str, int]]:
        """The conversation with nothing between its markers, as text and as ids, and where in it
        the ids of the text and of the codes belong.
        """
        settings = self.settings
        markers = _MARKERS[settings.task]
        values |= {field: "".join(pair) for field, pair in markers.items()}
        messages = (
            [{"role": "system", "content": settings.system.format(**values)}]
            if settings.system
            else []
        )
        messages += [
            {"role": "user", "content": settings.user.format(**values)},
            {"role": "assistant", "content": assistant.format(**values)},
        ]
        rendered = self._template.render(messages)
        frame = self._ids(rendered)
        places = {}
        for field, (start, _) in markers.items():
            at = np.flatnonzero(frame == self.vocab.markers[start])
            if len(at) != 1:
                raise UserError(
                    f"the prompt's templates must put {start} into the conversation once, but it"
                    f" stands there {len(at)} times"
                )
            places[field] = int(at[0]) + 1
        return rendered, frame, places

    def _chat(self, conversation: Conversation) -> tuple[np.ndarray, np.ndarray]:
        """Ids and loss up to the last assistant's turn; what follows it teaches nothing and is left
        out.
        """
        messages = conversation.messages
        name = f"the conversation {conversation.id!r}"
        roles = [message["role"] for message in messages]
        if (
            "assistant" not in roles
            or roles[roles[0] == "system"] != "user"
            or set(roles[1:]) - {"user", "assistant"}
        ):
            raise UserError(
                f"{name} has turns of {', '.join(roles) or 'nobody'}; it must open with a user's"
                " turn, after a system's at most, and hold an assistant's: correct it, or leave it"
                " out of the dataset"
            )
        pieces, done, end = [], "", 0
        for at, message in enumerate(messages):
            if not message["content"].strip():
                raise UserError(
                    f"{name} has an empty turn of the {message['role']}; correct it, or leave it"
                    " out of the dataset"
                )
            self._template.refuse_control(name, message["content"])
            if message["role"] != "assistant":
                continue
            # What the template writes before an answer and with it: so the loss needs no knowledge
            # of the template.
            before, after = (
                self._template.render(messages[:at], add_generation_prompt=True),
                self._template.render(messages[: at + 1]),
            )
            if not (before.startswith(done) and after.startswith(before)):
                raise UserError(
                    f"{name}: the tokenizer's chat template rewrites earlier turns, so that they"
                    " cannot be learned in one go"
                )
            pieces += [(before[len(done) :], False), (after[len(before) :], True)]
            done, end = after, at + 1
        plain = self._template.render([{**message, "content": "x"} for message in messages[:end]])
        self._template.refuse_joined_control(name, done, plain)
        ids = [self._ids(text) for text, _ in pieces]
        return np.concatenate(ids), np.repeat(
            [learned for _, learned in pieces], [len(part) for part in ids]
        )

    def _ids(self, text: str) -> np.ndarray:
        return np.asarray(self._tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)


def join_texts(first: str, second: str) -> str:
    """Two texts as one, with a space between them where the script in use has spaces."""
    needs_space = (
        first
        and second
        and first[-1].isascii()
        and second[0].isascii()
        and not (first[-1].isspace() or second[0].isspace())
    )
    return first + (" " if needs_space else "") + second
