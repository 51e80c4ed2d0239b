"""The command line. One file per group of commands: parse, call, print.

Each command imports what it needs when it runs, so that `--help` answers at once.
"""

import argparse
import logging
import os
import sys
import warnings

from llasa_jax import __version__
from llasa_jax.cli import data, inspect, model, plan, speak, train
from llasa_jax.errors import UserError
from llasa_jax.runtime.leave import leave

# In the order in which a voice is made, which is the order of `llasa-jax --help`.
GROUPS = (model, data, inspect, plan, train, speak)


def new_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="llasa-jax",
        description="Finetune Llasa, the LLaMA that speaks, in JAX.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for group in GROUPS:
        group.add_commands(commands)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs one command. Returns the exit status: 2 with one sentence on stderr for what the user
    can fix, 1 for bad findings.
    """
    parser = new_parser()
    args, settings = parser.parse_known_args(arguments)
    if settings and not args.takes_settings:
        parser.error(f"unrecognized arguments: {' '.join(settings)}")
    args.settings = settings
    warnings.showwarning = lambda message, *_, **__: print(
        f"llasa-jax: warning: {message}", file=sys.stderr
    )
    for name in ("absl", "orbax", "jax", "huggingface_hub"):  # they log at every step
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        return leave(args.run(args) or 0)
    except UserError as error:
        print(f"llasa-jax: error: {error}", file=sys.stderr)
        return leave(2)
    except KeyboardInterrupt:
        print(
            "llasa-jax: interrupted; the same command goes on where work was saved", file=sys.stderr
        )
        return leave(130)
    except SystemExit as stop:
        leave(stop.code)
        raise
