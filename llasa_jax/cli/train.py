"""The command train."""

import os
import re

from llasa_jax.cli.arguments import add_command
from llasa_jax.errors import UserError
from llasa_jax.runtime.signals import CommandSignal


def train(args) -> None:
    with CommandSignal() as stop:
        # Imported only now: these take seconds, in which a signal must end the process at once.
        from llasa_jax.finetune import finetune
        from llasa_jax.train.settings import parse_settings

        try:
            settings = parse_settings(args.settings)
        except UserError as error:
            tell_other_hosts(args.settings, str(error))
            raise
        finetune(settings, stop)


def tell_other_hosts(arguments: list[str], text: str) -> None:
    """Settings that this host refuses leave open whether there are others: if anything says so,
    they are informed, and do not wait for this one.
    """
    asked = any(re.match(r"--mesh\.hosts(=true|$)", argument, re.I) for argument in arguments)
    for path in [argument.removeprefix("--config=") for argument in arguments]:
        if not asked and path.endswith((".yaml", ".yml")) and os.path.isfile(path):
            with open(path, errors="replace") as file:
                asked = re.search(r"\bhosts:\s*true\b", file.read(1 << 20), re.I) is not None
    if asked:
        from llasa_jax.runtime import hosts

        hosts.report_failure(text, 2)


def add_commands(commands) -> None:
    # --config and --help are read with the settings, by parse_settings.
    add_command(
        commands,
        "train",
        train,
        "Finetune a model on records. `llasa-jax train --help` lists every setting.",
        takes_settings=True,
        add_help=False,
    )
