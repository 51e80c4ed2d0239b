"""The command train."""

import os
import re
import resource
import sys

from llasa_jax.cli.arguments import add_command
from llasa_jax.cli.restart import run_again
from llasa_jax.errors import UserError
from llasa_jax.runtime.settings import number
from llasa_jax.runtime.signals import CommandSignal

ADDRESSES = 3 << 30  # bytes; with less, XLA aborts or waits for ever as it starts
OPEN_FILES = 64


def train(args) -> int:
    if args.resume_loop:
        command = [sys.executable, "-m", "llasa_jax.cli", "train", *args.settings]
        return run_again(command, args.resume_loop)
    check_limits()
    with CommandSignal() as stop:
        # Imported only now: these take seconds, in which a signal must end the process at once.
        from llasa_jax.finetune import finetune
        from llasa_jax.train.parsing import parse_settings

        try:
            settings = parse_settings(args.settings)
        except UserError as error:
            tell_other_hosts(args.settings, str(error))
            raise
        finetune(settings, stop)
    return 0


def check_limits() -> None:
    """UserError where the shell's limits are too low for JAX and Orbax, whose threads would print
    tracebacks or abort.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if 0 <= limit < ADDRESSES:  # negative: no limit
        raise UserError(
            f"this process may use {limit / 1e9:.1f} GB of addresses, and JAX needs"
            f" {ADDRESSES / 1e9:.1f} to start; raise the limit (`ulimit -v unlimited`)"
        )
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= limit < OPEN_FILES:
        raise UserError(
            f"this process may open {limit} files at a time, and checkpoints need {OPEN_FILES};"
            " raise the limit (`ulimit -n 4096`)"
        )


def tell_other_hosts(arguments: list[str], text: str) -> None:
    """Settings that this host refuses leave open whether there are others: if anything says so,
    they are informed, and do not wait for this one.
    """
    texts = []
    for path in [argument.removeprefix("--config=") for argument in arguments]:
        if path.endswith((".yaml", ".yml")) and os.path.isfile(path):
            with open(path, errors="replace") as file:
                texts.append(file.read(1 << 20))
    texts += [word.removeprefix("--mesh.") for word in arguments if word.startswith("--mesh.")]
    named = r"\b(hosts|coordinator|process_count|process_index)\s*(?::\s|=)\s*([^\s,}]+)"
    said = dict(re.findall(named, "\n".join(texts)))
    if said.get("hosts", "").lower() == "true" or "coordinator" in said or "hosts" in texts:
        from llasa_jax.runtime import hosts

        numbers = {name: int(said[name]) for name in said if said[name].isdecimal()}
        given = hosts.Given(
            said.get("coordinator", "").strip("\"'"),
            numbers.get("process_count", 0),
            numbers.get("process_index", -1),
        )
        hosts.report_failure(text, 2, given)


def add_commands(commands) -> None:
    # --config and --help are read with the settings, by parse_settings.
    parser = add_command(
        commands,
        "train",
        train,
        "Finetune a model on records. `llasa-jax train --help` lists every setting.",
        takes_settings=True,
        add_help=False,
    )
    parser.add_argument("--resume-loop", type=number(int, low=0, high=1_000_000), default=0)
