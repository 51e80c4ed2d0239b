"""The command line. One file per group of commands: parse, call, print.

Each command imports what it needs when it runs, so that `--help` answers at once.
"""

import argparse
import logging
import os
import signal
import sys
import warnings

from llasa_jax import __version__
from llasa_jax.cli import data, evaluate, inspect, model, plan, prefer, serve, speak, train
from llasa_jax.cli.arguments import Parser
from llasa_jax.errors import UserError, printable
from llasa_jax.runtime.files import explain
from llasa_jax.runtime.signals import leave

# In the order in which a voice is made, which is the order of `llasa-jax --help`.
GROUPS = (model, data, inspect, plan, train, speak, serve, evaluate, prefer)


def new_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = Parser(
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
    sys.excepthook = _print_exception
    warnings.showwarning = lambda message, *_, **__: _say(f"warning: {message}")
    for name in ("absl", "orbax", "jax", "huggingface_hub"):  # they log at every step
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        parser = new_parser()
        args, settings = parser.parse_known_args(arguments)
        if settings and not args.takes_settings:
            parser.error(f"unrecognized arguments: {' '.join(settings)}")
        args.settings = settings
        status = args.run(args) or 0
        sys.stdout.flush()
        return leave(status)
    except UserError as error:
        _say(f"error: {error}")
        return leave(2)
    except BrokenPipeError:
        # The reader of our output is gone (`llasa-jax preview ... | head`). Python would complain
        # once more when it flushes stdout at its end, so that goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return leave(128 + signal.SIGPIPE)
    except Exception as error:
        # A fault of the machine, such as a permission, or a full disk in a library's own words
        if (sentence := explain(error)) is None:
            raise
        _say(f"error: {sentence}")
        return leave(2)
    except KeyboardInterrupt:
        _say("interrupted; the same command goes on where work was saved")
        return leave(130)
    except SystemExit as stop:
        leave(1 if isinstance(stop.code, str) else stop.code or 0)
        raise


def _print_exception(kind, error, trace) -> None:
    # TensorStore calls back, and prints this, after Orbax has told why a checkpoint failed.
    if str(error) != "Event loop is closed":
        sys.__excepthook__(kind, error, trace)


def _say(line: str) -> None:
    """Prints to stderr. Messages quote file names and texts, which must not steer the terminal."""
    print(f"llasa-jax: {printable(line, keep=chr(10))}", file=sys.stderr)
