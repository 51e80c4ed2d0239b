"""What several commands share: how a command is added, and the options that they have in common."""

import argparse
from collections.abc import Callable

from llasa_jax.errors import UserError, first_line
from llasa_jax.runtime.settings import DEVICE, MAX_SEED, number, text
from llasa_jax.runtime.storage import as_path

# Both are owned elsewhere (llasa_jax.codec, llasa_jax.data.importing). They are repeated here
# because importing their owners would slow `--help` down; tests/cli/test_cli.py compares them.
DEFAULT_CODEC = "HKUSTAudio/xcodec2-hf"
UNKNOWN_CODEC = "unknown"

DTYPES = ("float32", "bfloat16", "float16")


NAME = text("a name")
SEED = number(int, low=0, high=MAX_SEED)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are sentences, as all errors of the user."""

    def error(self, message: str):
        raise UserError(f"{message}; `{self.prog} --help` shows what can be given")


def add_command(
    commands, name: str, run: Callable, help: str, takes_settings: bool = False, **options
) -> argparse.ArgumentParser:
    """Adds the command `name`, which calls `run(args)`.

    With `takes_settings`, what the parser does not know (`--setting.name=value`) is left in
    `args.settings`, in order. Other commands refuse it.
    """
    parser = commands.add_parser(
        name,
        help=help,
        description=help,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
        **options,
    )
    parser.set_defaults(run=run, takes_settings=takes_settings)
    return parser


def add_config(parser: argparse.ArgumentParser, required: bool = True) -> None:
    parser.add_argument(
        "--config",
        action="append",
        required=required,
        metavar="FILE",
        help="the recipe; a machine's overlay may follow as a second one, and the later wins",
    )


def settings_of(args):
    """The `Settings` of a command with `--config` and settings of `train`."""
    from llasa_jax.runtime.copies import keep_copies_in
    from llasa_jax.train.parsing import parse_settings

    settings = parse_settings([*(f"--config={config}" for config in args.config), *args.settings])
    keep_copies_in(settings.data.cache_dir)
    return settings


def add_codec(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--codec",
        default=DEFAULT_CODEC,
        help="an XCodec2 checkpoint in transformers' format: a hub id or a folder",
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        type=DEVICE,
        default="cpu",
        help="what runs the codec: a device as PyTorch names it, or jax",
    )


def add_step(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--step",
        type=number(int, low=0),
        help="which of a run's checkpoints; the latest if not given",
    )


def add_base(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--base",
        help="where the base of a LoRA run lies now, if it was moved or copied: a folder or hub id",
    )


def add_validation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--validation-share",
        type=number(float, low=0, below=1),
        default=0.0,
        help="share of the clips that becomes the split `validation`",
    )
    parser.add_argument("--seed", type=SEED, default=0, help="of the choice of validation clips")


def add_max_bad_share(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-bad-share",
        type=number(float, low=0, high=1),
        default=0.05,
        help="fail if more than this share of the clips cannot be used",
    )


def add_sample(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--sample",
        type=number(int, low=1, high=1_000_000_000),
        default=200_000,
        help="look at no more clips of a split than this",
    )


def load_tokenizer(name: str):
    """The tokenizer of a hub id, a Hugging Face folder, or one of our models' or runs' folders."""
    from transformers import AutoTokenizer

    from llasa_jax.convert.hf_files import small_files
    from llasa_jax.convert.model_folder import HF_FOLDER

    inside = as_path(name) / HF_FOLDER
    folder = inside if inside.is_dir() else as_path(name)
    try:
        return AutoTokenizer.from_pretrained(small_files(folder))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{name}: no tokenizer can be loaded from it ({first_line(error)}); give a folder or a"
            " hub id"
        ) from None
