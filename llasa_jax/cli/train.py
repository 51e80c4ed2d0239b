"""The command train."""

from llasa_jax.cli.arguments import add_command
from llasa_jax.runtime.stop_signal import CommandSignal


def train(args) -> None:
    with CommandSignal() as stop:
        # Imported only now: these take seconds, in which a signal must end the process at once.
        from llasa_jax.finetune import finetune
        from llasa_jax.train.settings import parse_settings

        finetune(parse_settings(args.settings), stop)


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
