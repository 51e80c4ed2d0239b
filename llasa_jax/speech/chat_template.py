"""A tokenizer's chat template: from messages to text, and the control tokens in a text."""

import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from llasa_jax.errors import UserError, first_line
from llasa_jax.speech.vocab import MARKERS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[dict[str, str]]
TRIAL_SECONDS = 5.0  # a template takes milliseconds


class ChatTemplate:
    """`date` fills the template's "Today Date".

    Raises UserError for a tokenizer without a chat template, and for a template that fails, or
    takes longer than `TRIAL_SECONDS` for a short conversation (templates come from others, and may
    loop).
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", date: str):
        self._tokenizer, self._date = tokenizer, date
        self._name = f"the chat template of the tokenizer {tokenizer.name_or_path}"
        if tokenizer.chat_template is None:
            raise UserError(
                f"the tokenizer {tokenizer.name_or_path} has no chat template; use that of a Llama"
                " Instruct or Llasa checkpoint"
            )
        special = [
            token.content for token in tokenizer.added_tokens_decoder.values() if token.special
        ]
        self._control = re.compile(
            "|".join([*map(re.escape, [*special, *MARKERS]), r"<\|s_\d{1,5}\|>"])
        )
        with _time_limit(TRIAL_SECONDS, f"{self._name} takes longer than {TRIAL_SECONDS:g} s"):
            self.render([{"role": role, "content": "x"} for role in ("user", "assistant")])

    def render(self, messages: Messages, **options) -> str:
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    list(messages), tokenize=False, date_string=self._date, **options
                )
            )
        except UserError:
            raise
        except Exception as error:  # whatever the template's own code raises
            raise UserError(
                f"{self._name} fails ({first_line(error)}); use that of a Llama Instruct or Llasa"
                " checkpoint"
            ) from error

    def control_tokens(self, text: str) -> list[str]:
        return self._control.findall(text)

    def refuse_control(self, name: str, text: str) -> None:
        """UserError if `text`, which `name` has, contains a control token."""
        if found := self._control.search(text):
            raise UserError(
                f"{name} contains the control token {found[0]}, which would break the prompt; take"
                " it out of the text"
            )

    def refuse_joined_control(self, name: str, rendered: str, plain: str) -> None:
        """UserError if the finished prompt has other control tokens than the same prompt `plain`,
        rendered of harmless texts: parts may make one together that none of them has.
        """
        if rendered == plain:
            return
        found, expected = self.control_tokens(rendered), self.control_tokens(plain)
        if found != expected:
            pairs = zip(found, [*expected, ""], strict=False)
            token = next((one for one, other in pairs if one != other), found[-1])
            raise UserError(
                f"{name} contains the control token {token}, made of parts that stand side by side"
                " in the prompt; change the texts or the templates"
            )


@contextmanager
def _time_limit(seconds: float, what: str) -> Iterator[None]:
    """UserError, beginning with `what`, where Python code in the block runs longer than this."""
    end = time.thread_time() + seconds  # of computing, so that a busy machine does not matter

    def watch(frame, event, argument):
        if time.thread_time() > end:
            raise UserError(f"{what}; use that of a Llama Instruct or Llasa checkpoint")
        return watch

    before = sys.gettrace()
    sys.settrace(watch)  # called at every line of new frames: the only way to stop a loop
    try:
        yield
    finally:
        sys.settrace(before)
