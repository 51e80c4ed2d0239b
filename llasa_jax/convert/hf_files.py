"""An HF checkpoint's folder, found or downloaded, and its small files: which belong to a model,
what they say, and what a model that speaks changes in them.
"""

import copyreg
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from llasa_jax.convert.safetensors_io import INDEX
from llasa_jax.errors import UserError, first_line
from llasa_jax.runtime import files, storage
from llasa_jax.runtime.copies import local_copy
from llasa_jax.runtime.storage import as_path, is_remote
from llasa_jax.speech.settings import PromptSettings
from llasa_jax.speech.vocab import MARKERS, SPEECH_GENERATION

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONFIG, GENERATION_CONFIG, CARD = "config.json", "generation_config.json", "README.md"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
PROMPT = "llasa_prompt"  # our own key in config.json; transformers keeps what it does not know
# The class of tokenizers that are all in tokenizer.json, Llama 3's among them: its names in
# transformers 4 and 5.
GENERIC = "PreTrainedTokenizerFast", "TokenizersBackend"
KEPT = re.compile(
    r".*\.(json|jinja|model|txt|md)|LICEN[CS]E.*|NOTICE.*|USE_POLICY.*", re.IGNORECASE
)
DOWNLOADED = [
    "*.safetensors",
    "*.json",
    "*.jinja",
    "*.model",
    "*.txt",
    "*.md",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
]
NOT_DOWNLOADED = ["original/*", "onnx/*", "consolidated*"]
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


def locate(source: str | Path, weights: bool = True) -> tuple[Path, str]:
    """The folder of a checkpoint, downloaded if `source` is a hub id (without its weights where
    they are not wanted), and the name to know it by: never a path of this machine.
    """
    if str(source).startswith("hf://"):
        source = str(source).removeprefix("hf://").strip("/")
    elif is_remote(source):
        storage.check_reachable(source, "the model")
        return as_path(source), as_path(source).name
    path = Path(source)
    if path.is_dir():
        cached = [part for part in path.absolute().parts if part.startswith("models--")]
        name = cached[-1].removeprefix("models--").replace("--", "/") if cached else None
        return path, name or path.resolve().name
    source = str(source)
    if path.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source):
        raise UserError(
            f"{source} holds no model: it is no folder and no hub id; give the folder of a model"
            " or of a Hugging Face checkpoint, or an id such as HKUSTAudio/Llasa-1B"
        )
    from huggingface_hub import snapshot_download

    patterns = DOWNLOADED if weights else DOWNLOADED[1:]
    try:
        return (
            Path(
                snapshot_download(source, allow_patterns=patterns, ignore_patterns=NOT_DOWNLOADED)
            ),
            source,
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = first_line(error)
        raise UserError(
            f"{source} holds no model: it is no folder here and cannot be downloaded ({reason});"
            " check name and network, and log in where the model is gated"
        ) from error


def small_files(folder: Path) -> Path:
    """A folder of this machine with a checkpoint's files other than weights, for the libraries that
    read them: `folder` itself, or a copy of what lies in a bucket.
    """

    def wanted(name: str) -> bool:
        parent, _, last = name.rpartition("/")
        return parent in ("", MORE_TEMPLATES) and bool(KEPT.fullmatch(last))

    return local_copy(folder, wanted=wanted)


def copy_small_files(source: Path, destination: Path, names: Sequence[str] | None = None) -> None:
    """Copies a checkpoint's files other than weights (or those of `names`), byte for byte: configs,
    tokenizer, chat templates, card, licence. UserError where one is a symbolic link to a file
    outside the checkpoint: what is copied here is published with a release.
    """
    destination.mkdir(parents=True, exist_ok=True)
    paths = [path for path in source.iterdir() if KEPT.fullmatch(path.name) and path.name != INDEX]
    more = source / MORE_TEMPLATES
    for path in sorted([*paths, *(more.iterdir() if more.is_dir() else ())]):
        if not path.is_file() or (names is not None and path.name not in names):
            continue
        if not _stays_inside(path, source):
            raise UserError(
                f"{path} is a symbolic link to {path.resolve()}, outside the checkpoint; replace"
                " it by a copy of that file, or remove it"
            )
        copy = destination / path.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)


def _stays_inside(path: Path, folder: Path) -> bool:
    """Whether a file of a checkpoint's folder really lies there, or in the hub's cache, whose
    folders hold links to the files of all revisions.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    absolute = folder.absolute()
    caches = [parent for parent in absolute.parents if parent.name.startswith("models--")]
    allowed = [folder, Path(HF_HUB_CACHE), *caches]
    return any(path.resolve().is_relative_to(place.resolve()) for place in allowed)


def read_json(path: Path) -> dict:
    """The object in a JSON file. UserError where it is absent or damaged."""
    fix = "download it again, and give the folder of a complete HF checkpoint"
    return files.read_json(path, f"the checkpoint's {path.name}", fix=fix)


def write_json(path: Path, content: dict) -> None:
    """Writes as HF does. A file that says the same already stays as it is, byte for byte."""
    if not path.is_file() or read_json(path) != content:
        path.write_text(json.dumps(content, indent=2) + "\n")


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerBase | None":
    """The tokenizer in an HF folder, None if there is none. UserError where it cannot be read."""
    from tokenizers import AddedToken

    if not (folder / TOKENIZER_CONFIG).is_file():
        return None
    described = read_json(folder / TOKENIZER_CONFIG)
    generic = described.get("tokenizer_class") in GENERIC and "auto_map" not in described
    # AutoTokenizer comes to the same class, but imports PyTorch, which takes two seconds.
    name = "PreTrainedTokenizerFast" if generic else "AutoTokenizer"
    tokenizer_class = getattr(import_module("transformers"), name)
    # transformers deep-copies its arguments, the 65,544 speech tokens among them, which is nearly
    # half of the time. A string in place of a recipe tells `copy` to take the object itself.
    copyreg.dispatch_table[AddedToken] = str
    try:
        return tokenizer_class.from_pretrained(folder)
    except Exception as error:  # noqa: BLE001 the tokenizers library raises plain Exceptions
        raise UserError(
            f"the tokenizer in {folder} cannot be read ({first_line(error)}); download it again"
        ) from error
    finally:
        del copyreg.dispatch_table[AddedToken]


def vocabulary(folder: Path) -> dict[str, int]:
    """Every token of the tokenizer in an HF folder and its id; empty if there is no tokenizer.
    UserError where it cannot be read.
    """
    from tokenizers import Tokenizer

    # Without transformers, which takes seconds and half a gigabyte for 193,800 tokens.
    path = folder / TOKENIZER
    if path.is_file():
        read_json(path)
        try:
            tokens = Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True)
        except Exception as error:  # noqa: BLE001 the library raises plain Exceptions
            raise UserError(
                f"{path}: the tokenizer cannot be read ({first_line(error)}); download it again"
            ) from error
    else:
        tokenizer = load_tokenizer(folder)
        tokens = tokenizer.get_vocab() if tokenizer else {}
    config = read_json(folder / TOKENIZER_CONFIG) if (folder / TOKENIZER_CONFIG).is_file() else {}
    # Old checkpoints have added tokens that are in this file alone.
    added = config.get("added_tokens_decoder", {})
    try:
        return {token["content"]: int(number) for number, token in added.items()} | tokens
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(
            f"{folder / TOKENIZER_CONFIG}: added_tokens_decoder is damaged; download it again"
        ) from None


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


def prompt_of(config: Path) -> dict[str, dict[str, str]]:
    """`prompt`, the `PromptSettings` that a checkpoint was trained with, as a dict, where its
    config.json has them. UserError where they cannot be such.
    """
    values = read_json(config).get(PROMPT)
    if values is None:
        return {}
    try:
        return {"prompt": asdict(PromptSettings(**values).filled(PROMPT))}
    except TypeError as error:
        raise UserError(
            f"{config}: {PROMPT} cannot be read ({first_line(error)}); take it out, and name the"
            " prompts in the settings"
        ) from error


def licence(folder: Path) -> dict[str, str]:
    """`license`, `license_name` and `license_link` from the front matter of a model card, as far as
    they are there.
    """
    from huggingface_hub import metadata_load

    try:
        front = metadata_load(folder / CARD) if (folder / CARD).is_file() else {}
    except (ValueError, yaml.YAMLError):
        front = {}
    front = front if isinstance(front, dict) else {}
    return {
        name: str(front[name])
        for name in ("license", "license_name", "license_link")
        if front.get(name)
    }
