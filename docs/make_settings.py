"""Prints settings.md, the page of every setting, from the dataclasses that define them.

    python docs/make_settings.py > docs/settings.md

tests/test_docs.py fails when the page is not what this program prints.
"""

from collections.abc import Iterator
from dataclasses import MISSING, fields
from inspect import cleandoc
from typing import Literal, get_args, get_origin

import docstring_parser
import yaml

from llasa_jax.runtime.settings import groups_of, notes
from llasa_jax.train.settings import Settings

HEAD = """# Every setting

Settings are read from YAML files (`--config FILE`, more than once if need be) and from the command
line (`--train.rows=32`); the later one wins. Unknown settings and values out of range are refused.
This page is made from the code by `docs/make_settings.py`.
"""


def page() -> str:
    return "\n".join([HEAD, *_group(Settings, "")])


def _group(cls: type, prefix: str) -> Iterator[str]:
    """The sections of a dataclass: its own settings as a table, then each group within it."""
    docs = {
        param.arg_name: " ".join((param.description or "").split())
        for param in docstring_parser.parse_from_object(cls).params
    }
    groups, rows = [], []
    for field in fields(cls):
        group = next(groups_of(field.type), None)
        if group is field.type:
            groups.append((group, f"{prefix}{field.name}."))
            continue
        if group and get_origin(field.type) is list:
            groups.append((group, f"{prefix}{field.name}[]."))
        text = f"{docs.get(field.name, '')} {notes(field)}".strip()
        rows.append(f"| `{prefix}{field.name}` | {_default(field)} | {_cell(text, field.type)} |")
    yield f"## {prefix.rstrip('.') or 'The run'}\n"
    yield cleandoc(cls.__doc__ or "") + "\n"
    if rows:
        yield "| setting | default | |\n| --- | --- | --- |"
        yield "\n".join(rows) + "\n"
    for group, name in groups:
        yield from _group(group, name)


def _default(field) -> str:
    value = field.default_factory() if field.default is MISSING else field.default
    if value is None or value in ("", []):
        return "none"
    text = yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()
    return f"`{text}`"


def _cell(text: str, type_) -> str:
    """What a setting does, after the values that it can take."""
    values = get_args(type_) if get_origin(type_) is Literal else ()
    allowed = " \\| ".join(f"`{value}`" for value in values if value != "")
    text = text.replace("|", "\\|")
    return f"{allowed}. {text}".strip(" .") + "." if allowed else text


if __name__ == "__main__":
    print(page(), end="")
