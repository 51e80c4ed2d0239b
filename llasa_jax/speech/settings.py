"""Settings of prompts: the task and its wording."""

import re
import string
from dataclasses import dataclass, replace
from typing import Any, Literal

from llasa_jax.errors import UserError
from llasa_jax.runtime.settings import setting
from llasa_jax.speech.vocab import MARKERS

Task = Literal["tts", "asr", "chat"]
TEMPLATES = {
    "tts": {
        "user": "Convert the text to speech:{text}",
        "assistant": "{codes}",
        "assistant_with_speaker": "Speaker {speaker}{codes}",
    },
    "asr": {"user": "Transcribe the following speech:{codes}", "assistant": "{text}"},
    "chat": {},
}
# What the assistant says, and so what is learned.
LEARNED = {"tts": "codes", "asr": "text"}
# What templates may name: the fields of an utterance, without its id.
FIELDS = ("codes", "description", "language", "speaker", "text")
# Tokens that structure a conversation or speech; a tokenizer may have more of them, which
# `Prompter` looks for.
_CONTROL = re.compile(
    "|".join(
        [
            *map(re.escape, MARKERS),
            r"<\|s_\d{1,5}\|>",
            r"<\|(?:begin_of_text|end_of_text|start_header_id|end_header_id|eot_id|eom_id)\|>",
        ]
    )
)


@dataclass(frozen=True)
class PromptSettings:
    """The task and its wording. Templates may name {text}, {codes}, {speaker}, {description} and
    {language}; an empty one is the task's own.
    """

    task: Task = "tts"
    """tts learns to speak a text, asr to write down speech; chat learns written conversations,
    whose records bring their messages, so that it has no templates."""
    user: str = setting("")
    """The user's turn: "Convert the text to speech:{text}" for tts, "Transcribe the following
    speech:{codes}" for asr."""
    assistant: str = setting("")
    """The assistant's turn: "{codes}" for tts, "{text}" for asr."""
    assistant_with_speaker: str = setting("")
    """The assistant's turn for utterances that name a speaker: "Speaker {speaker}{codes}" for
    tts."""
    system: str = setting("")
    """The system turn; empty, the chat template's own."""
    date: str = setting(
        "26 Jul 2024",
        pattern=r"(\d{1,2} [A-Z][a-z]{2} \d{4})?",
        words="a day such as 26 Jul 2024",
    )
    """The chat template's "Today Date", so that no prompt depends on the day it is made."""
    mask: Literal["clean", "upstream"] = "clean"
    """clean lets tokens attend to the whole prompt, as at inference; upstream hides every
    <|eot_id|> from attention, as upstream's training does by padding with it."""

    def check(self, name: str) -> None:
        """UserError if the templates cannot work; `name` is that of these settings."""
        self.filled(name)

    def filled(self, name: str = "prompt") -> "PromptSettings":
        """These settings with the task's own wording where a template is empty. UserError, calling
        them `name`, if they cannot work.
        """
        given = {
            field: getattr(self, field)
            for field in ("system", "user", "assistant", "assistant_with_speaker")
        }
        if self.task == "chat" and any(given.values()):
            raise UserError(
                f"{name} words a turn, but the task chat takes all turns from its records; leave"
                " out what is not task, date or mask"
            )
        wording: dict[str, Any] = {
            field: given[field] or template for field, template in TEMPLATES[self.task].items()
        }
        filled = replace(self, **wording)
        filled = replace(
            filled, assistant_with_speaker=filled.assistant_with_speaker or filled.assistant
        )
        for template in given:
            filled._check_template(f"{name}.{template}", getattr(filled, template))
        if self.task in LEARNED:
            filled._check_contents(name)
        return filled

    def _check_template(self, name: str, template: str) -> None:
        for field in fields_of(template, name):
            if field not in FIELDS:
                raise UserError(
                    f"{name} mentions {{{field}}}, which no utterance has; use any of"
                    f" {', '.join(FIELDS)}"
                )
        if found := _CONTROL.search(template):
            raise UserError(
                f"{name} contains the control token {found[0]}, which would break the prompt; take"
                " it out, for the tokenizer's chat template and the fields bring theirs"
            )

    def _check_contents(self, name: str) -> None:
        """The learned field stands in the assistant's turn, and each of both in the conversation
        once.
        """
        learned = LEARNED[self.task]
        turns = (self.assistant, self.assistant_with_speaker)
        if any(learned not in fields_of(turn) for turn in turns):
            raise UserError(
                f"{name}.assistant and {name}.assistant_with_speaker must each contain"
                f" {{{learned}}}, which {self.task} learns"
            )
        for turn in turns:
            conversation = fields_of(self.system) + fields_of(self.user) + fields_of(turn)
            for field in ("text", "codes"):
                if conversation.count(field) != 1:
                    raise UserError(
                        f"{name}: system, user and assistant must put {{{field}}} into the"
                        f" conversation once, but it stands there {conversation.count(field)} times"
                    )


def fields_of(template: str, name: str = "prompt") -> list[str]:
    """Names of the fields that a template mentions, in order. UserError, with its setting's `name`,
    if it is malformed, or formats a field in any way.
    """
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UserError(
            f"{name}: the template {template!r} is malformed ({error}); write {{{{ and }}}} for"
            " braces of its own"
        ) from None
    for _, field, spec, conversion in parts:
        if spec or conversion:
            raise UserError(
                f"{name}: the template {template!r} formats {{{field}}}; write {{{field}}} alone,"
                " for the model must see it as it is"
            )
    return [field for _, field, _, _ in parts if field is not None]
