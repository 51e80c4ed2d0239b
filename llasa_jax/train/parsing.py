"""The settings of a training run, read from YAML files and the command line. Unknown keys are
errors.
"""

import difflib
from dataclasses import Field, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_args

import yaml

from llasa_jax.errors import UserError
from llasa_jax.runtime.files import read_yaml
from llasa_jax.runtime.settings import groups_of, notes
from llasa_jax.train.settings import Settings


def parse_settings(arguments: list[str]) -> Settings:
    """Settings from `--config FILE`, which may be given several times, and `--any.setting=value`;
    later ones win. UserError on an unknown key or a bad value.
    """
    from jsonargparse import ArgumentError

    _check_arguments(arguments)
    parser = settings_parser()
    try:
        parsed = parser.parse_args(arguments)
    except ArgumentError as error:
        raise UserError(" ".join(str(error).split())) from None
    parsed.pop("config")
    return Settings(**vars(parser.instantiate(parsed)))


@cache
def settings_parser():
    """The parser of `llasa-jax train`, whose help explains every setting."""
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog="llasa-jax train",
        exit_on_error=False,
        allow_abbrev=False,
        description="Finetunes a model on records. With --resume-loop=N before the settings it is"
        " started again up to N times where it fails.",
    )
    parser.add_argument(
        "--config",
        action="config",
        help="a YAML file with any of the settings below; of several, the later wins",
    )
    parser.add_class_arguments(Settings)
    explained = all_fields(Settings)
    for action in parser._actions:
        if action.dest in explained:
            action.help = f"{action.help} {notes(explained[action.dest])}".strip()
    return parser


def _check_arguments(arguments: list[str]) -> None:
    """Refuses what the parser would not: unknown keys with the nearest known one, files that are
    not settings, and a setting given twice.
    """
    known = {name: field.type for name, field in all_fields(Settings).items()}
    given: dict[str, str] = {}
    for at, argument in enumerate(arguments):
        if not argument.startswith("--"):
            continue
        name, equals, value = argument.removeprefix("--").partition("=")
        value = value if equals else "".join(arguments[at + 1 : at + 2])
        if name == "config":
            _check_file(Path(value), known)
        elif name not in ("help", "print_config"):
            _check_key(name.removesuffix("+"), "the command line", known)
            if is_dataclass(known[name.removesuffix("+")]):
                raise UserError(
                    f"{name} is a group of settings; give each as --{name}.NAME=VALUE, or many in"
                    " a --config FILE"
                )
            if given.setdefault(name, value) != value and not name.endswith("+"):
                raise UserError(
                    f"{name} is given twice, as {given[name]} and {value}; give it once"
                )


def _check_file(path: Path, known: dict[str, Any]) -> None:
    tree = read_yaml(
        path, "the config", fix="write settings as `key: value`, as the recipes in configs/ do"
    )

    def walk(group: dict, prefix: str):
        for key, value in group.items():
            _check_entry(f"{prefix}{key}", value, path, known)
            for inner in value if isinstance(value, list) else [value]:
                if isinstance(inner, dict):
                    walk(inner, f"{prefix}{key}.")

    walk(tree, "")
    _check_repeated(path, yaml.compose(path.read_text("utf-8-sig"), yaml.SafeLoader))


def _check_repeated(path: Path, node: yaml.Node | None) -> None:
    """Refuses the same key twice in one mapping, of which YAML would drop the first."""
    if isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in node.value]
        for key, value in node.value:
            if keys.count(key.value) > 1:
                raise UserError(
                    f"{path}, line {key.start_mark.line + 1}: {key.value} is given twice in one"
                    " place; join them"
                )
            _check_repeated(path, value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _check_repeated(path, value)


def _check_entry(key: str, value: Any, path: Path, known: dict[str, Any]) -> None:
    """Refuses an unknown key, and what YAML takes for another type where a text is wanted."""
    _check_key(key, str(path), known)
    wanted = known[key]
    if value is None and wanted not in (str, list[str]) and type(None) not in get_args(wanted):
        raise UserError(f"{key} in {path} is null; give it a value, or leave it out")
    if is_dataclass(wanted) and not isinstance(value, dict):
        raise UserError(
            f"{key} in {path} is {value!r}, but a group of"
            " settings; give it some of them, or leave it out"
        )
    values = value if wanted == list[str] and isinstance(value, list) else [value]
    for text in values if wanted in (str, list[str]) else []:
        if text is None:
            raise UserError(f"{key} in {path} is null; give it a value, or leave it out")
        if not isinstance(text, str | list | dict):
            raise UserError(f"{key} in {path} is {text}, which is not a text; put it in quotes")


def all_fields(cls: type, prefix: str = "") -> dict[str, Field]:
    """Every setting and group by its full name."""
    named = {}
    for field in fields(cls):
        named[prefix + field.name] = field
        for inner in groups_of(field.type):
            named |= all_fields(inner, f"{prefix}{field.name}.")
    return named


def _check_key(key: str, where: str, known: dict[str, Any]) -> None:
    if key not in known:
        close = difflib.get_close_matches(key, known, 1, 0.0)
        raise UserError(f"unknown setting {key} in {where}; did you mean {close[0]}?")
