"""Settings: dataclasses whose fields carry their allowed values and whether a resumed run may
change them.

Each room declares its own group of settings with `setting`; `llasa_jax.train.settings` composes
them. `check` refuses what is not allowed, in one place for all of them. `number` checks options of
the other commands in the same way.
"""

import argparse
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import Field, dataclass, field, fields, is_dataclass
from typing import Any, get_args

from llasa_jax.errors import UserError

# Longest path and longest name in one that Linux takes, in bytes.
LONGEST_PATH, LONGEST_NAME = 4095, 255
# Devices on which a codec can run: one of PyTorch's, or JAX's.
CODEC_DEVICE = r"(cpu|cuda|mps|xpu|hpu)(:\d{1,3})?|jax(:\d{1,3}(,\d{1,3})*)?"
DEVICE_WORDS = (
    "a device as PyTorch names it, such as cpu, cuda or cuda:1, or jax for all of JAX's devices, or"
    " some of them, such as jax:2,3"
)
# What is drawn from 31 bits can seed every generator in use: NumPy's, Grain's, PyTorch's and JAX's.
MAX_SEED = 2**31 - 1


@dataclass(frozen=True)
class Allowed:
    """What a setting's value may be: a finite number from `low` to `high`, or above `above` and
    below `below`; a string that is a usable path or matches a `pattern`, which is `words`.
    """

    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None
    path: bool = False
    pattern: str = ""
    words: str = ""

    def __str__(self) -> str:
        """The allowed range in words, as the end of "must be"."""
        if self.words:
            return self.words
        if self.path:
            return f"a path of at most {LONGEST_PATH} bytes, its names of at most {LONGEST_NAME}"
        parts = [
            f"{words} {bound:,}"
            for words, bound in (
                ("at least", self.low),
                ("above", self.above),
                ("at most", self.high),
                ("below", self.below),
            )
            if bound is not None
        ]
        return " and ".join(parts)

    def takes(self, value: Any) -> bool:
        """Whether `value` is allowed. Lists are looked at element by element."""
        if isinstance(value, list):
            return all(map(self.takes, value))
        if isinstance(value, str):
            return self._takes_text(value)
        return (
            math.isfinite(value)
            and (self.low is None or value >= self.low)
            and (self.high is None or value <= self.high)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def _takes_text(self, text: str) -> bool:
        if self.pattern and not re.fullmatch(self.pattern, text, re.ASCII):
            return False
        if not self.path:
            return True
        try:
            names = [name.encode(errors="surrogateescape") for name in text.split("/")]
        except UnicodeEncodeError:  # half a character, which no file's name can hold
            return False
        longest = max(map(len, names))
        return (
            "\0" not in text
            and longest <= LONGEST_NAME
            and sum(map(len, names)) + len(names) - 1 <= LONGEST_PATH
        )


def setting(default: Any, *, resume: bool = False, **allowed) -> Any:
    """A dataclass field of a settings group. `allowed` are `Allowed`'s bounds; `resume` marks a
    setting that may differ between a run and its continuation. A callable `default` makes each
    object's own.
    """
    kind = "default_factory" if callable(default) else "default"
    metadata = {"resume": resume} | ({"allowed": Allowed(**allowed)} if allowed else {})
    return field(**{kind: default}, metadata=metadata)


def group(cls: type) -> Any:
    """A field that holds the settings of `cls`, with their defaults."""
    return field(default_factory=cls)


def check(settings: Any, name: str = "") -> None:
    """UserError, with the setting's full name, its value and the allowed range, if any value of
    these settings or of a group in them is not allowed; `name` is that of the group.

    Then each group's own `check(name)` looks at what its settings mean together, where it has one.
    """
    prefix = f"{name}." if name else ""
    for field_ in fields(settings):
        value, full = getattr(settings, field_.name), prefix + field_.name
        if is_dataclass(value):
            check(value, full)
        elif isinstance(value, list) and value and is_dataclass(value[0]):
            for at, member in enumerate(value):
                check(member, f"{full}[{at}]")
        elif value is not None or not list(groups_of(field_.type)):
            _check_value(full, value, field_.metadata.get("allowed"))
    if hasattr(settings, "check"):
        settings.check(name)


def _check_value(name: str, value: Any, allowed: Allowed | None) -> None:
    if {None, "null"} & {*(value if isinstance(value, list) else [value])}:
        # YAML's null where a text is wanted would become the text "null".
        raise UserError(f"{name} is null; give it a value, or leave it out")
    if allowed and not allowed.takes(value):
        shown = repr(value) if isinstance(value, str) else str(value)
        shown = shown if len(shown) <= 80 else f"{shown[:80]}..."
        raise UserError(f"{name} is {shown}; it must be {allowed}")


def may_change(cls: type, name: str = "") -> set[str]:
    """Full names of the settings in `cls` that may differ when a run resumes, those of its groups
    included.
    """
    prefix = f"{name}." if name else ""
    names = set()
    for field_ in fields(cls):
        if field_.metadata.get("resume"):
            names.add(prefix + field_.name)
        for inner in groups_of(field_.type):
            names |= may_change(inner, prefix + field_.name)
    return names


def notes(field_: Field) -> str:
    """What may be said of a setting besides its docstring: its range, and whether it may change."""
    allowed, said = field_.metadata.get("allowed"), []
    if allowed and not allowed.path:
        said.append(f"It must be {allowed}.")
    if field_.metadata.get("resume"):
        said.append("It may change when a run resumes.")
    return " ".join(said)


def groups_of(kind: Any) -> Iterator[type]:
    """The settings groups in a field's type: a group, a list of them, or one that may be None."""
    return filter(is_dataclass, (kind, *get_args(kind)))


def number(kind: type[int] | type[float], **allowed) -> Callable[[str], float]:
    """An argparse `type` for a number in a range: `type=number(int, low=1, high=256)`."""
    bounds = Allowed(**allowed)

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a {'whole ' if kind is int else ''}number; it must be {bounds}"
            ) from None
        if not bounds.takes(value):
            raise argparse.ArgumentTypeError(f"must be {bounds} but is {text}")
        return value

    return parse


def text(name: str, pattern: str = r"[^\x00-\x1f\x7f]*\S[^\x00-\x1f\x7f]*") -> Callable[[str], str]:
    """An argparse `type` for a text of the form `pattern`, by default one line that is not empty.
    `name` says what it is: `type=text("a name")`.
    """

    def parse(value: str) -> str:
        if not re.fullmatch(pattern, value, re.ASCII):
            raise argparse.ArgumentTypeError(f"{value!r} is not {name}")
        return value

    return parse


DEVICE = text(DEVICE_WORDS, CODEC_DEVICE)
"""An argparse `type` for --device."""
