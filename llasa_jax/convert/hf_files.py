"""The small files of an HF checkpoint: which belong to a model, what they say, and what a model
that speaks changes in them.
"""

import json
import re
import shutil
from pathlib import Path

import yaml

from llasa_jax.convert.safetensors_io import INDEX
from llasa_jax.errors import UserError, first_line
from llasa_jax.runtime import files
from llasa_jax.speech.vocab import MARKERS, SPEECH_GENERATION

CONFIG, GENERATION_CONFIG, CARD = "config.json", "generation_config.json", "README.md"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
KEPT = re.compile(
    r".*\.(json|jinja|model|txt|md)|LICEN[CS]E.*|NOTICE.*|USE_POLICY.*", re.IGNORECASE
)
MORE_TEMPLATES = "additional_chat_templates"
# What transformers writes for a tokenizer; all of it is replaced together.
TOKENIZER_FILES = (
    *(
        TOKENIZER,
        TOKENIZER_CONFIG,
        "special_tokens_map.json",
        "added_tokens.json",
        "tokenizer.model",
    ),
    *("vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json"),
)
# Neither ends a turn, so HF's `generate` hides nothing of the prompt when it masks padding.
PADS = ("<|finetune_right_pad_id|>", "<|end_of_text|>")


def copy_small_files(source: Path, destination: Path) -> None:
    """Copies a checkpoint's files other than weights, byte for byte: configs, tokenizer, chat
    templates, card, licence.
    """
    destination.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir()):
        if path.is_file() and KEPT.fullmatch(path.name) and path.name != INDEX:
            shutil.copyfile(path, destination / path.name)
    if (source / MORE_TEMPLATES).is_dir():
        shutil.copytree(source / MORE_TEMPLATES, destination / MORE_TEMPLATES)


def read_json(path: Path) -> dict:
    """The object in a JSON file. UserError where it is absent or damaged."""
    fix = "download it again, and give the folder of a complete HF checkpoint"
    return files.read_json(path, f"the checkpoint's {path.name}", fix=fix)


def write_json(path: Path, content: dict) -> None:
    """Writes as HF does. A file that says the same already stays as it is, byte for byte."""
    if not path.is_file() or read_json(path) != content:
        path.write_text(json.dumps(content, indent=2) + "\n")


def load_tokenizer(folder: Path):
    """The tokenizer in an HF folder, None if there is none. UserError where it cannot be read."""
    from transformers import AutoTokenizer

    if not (folder / TOKENIZER_CONFIG).is_file():
        return None
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"the tokenizer in {folder} cannot be read ({first_line(error)}); download it again"
        ) from error


def vocabulary(folder: Path) -> dict[str, int]:
    """Every token of the tokenizer in an HF folder and its id; empty if there is no tokenizer.
    UserError where it cannot be read.

    Read from the files where they say it plainly: building a tokenizer of 193,800 tokens takes
    seconds and half a gigabyte.
    """
    path = folder / TOKENIZER
    content = read_json(path) if path.is_file() else {}
    tokens = content.get("model", {}).get("vocab")
    if not isinstance(tokens, dict):
        tokenizer = load_tokenizer(folder)
        return tokenizer.get_vocab() if tokenizer else {}
    added = {token["content"]: token["id"] for token in content.get("added_tokens", [])}
    config = read_json(folder / TOKENIZER_CONFIG) if (folder / TOKENIZER_CONFIG).is_file() else {}
    old_style = {
        token["content"]: int(number)
        for number, token in config.get("added_tokens_decoder", {}).items()
    }
    return tokens | old_style | added


def speaks(tokens: dict[str, int]) -> bool:
    """Whether a vocabulary has Llasa's speech tokens."""
    return MARKERS[0] in tokens


def write_generation_config(folder: Path, tokens: dict[str, int]) -> None:
    """Makes `generate` stop at <|SPEECH_GENERATION_END|> and pad with a token that ends no turn.
    All else stays.

    `folder` is an HF folder with a config.json, `tokens` a vocabulary that speaks. HF hides every
    pad token of a prompt from attention, and would hide the ends of its turns where <|eot_id|>
    pads.
    """
    path = folder / GENERATION_CONFIG
    config = read_json(folder / CONFIG)
    generation = (
        read_json(path)
        if path.is_file()
        else {name: config[name] for name in ("bos_token_id", "eos_token_id") if name in config}
    )
    ends = generation.get("eos_token_id")
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    speech_end = tokens[SPEECH_GENERATION[1]]
    generation["eos_token_id"] = ends if speech_end in ends else [*ends, speech_end]
    pads = [tokens[token] for token in PADS if token in tokens]
    if pads and generation.get("pad_token_id") in (None, -1, *generation["eos_token_id"]):
        generation["pad_token_id"] = pads[0]
    write_json(path, generation)


def licence(folder: Path) -> dict[str, str]:
    """`license`, `license_name` and `license_link` from the front matter of a model card, as far as
    they are there.
    """
    card = folder / CARD
    match = (
        re.match(r"---\s*\n(.*?)\n---", card.read_text(errors="replace"), re.DOTALL)
        if card.is_file()
        else None
    )
    try:
        front = yaml.safe_load(match[1]) if match else {}
    except yaml.YAMLError:
        front = {}
    front = front if isinstance(front, dict) else {}
    return {
        name: str(front[name])
        for name in ("license", "license_name", "license_link")
        if front.get(name)
    }
