"""The command line: it answers quickly, and each option reaches the parser that owns it."""

import os
import subprocess
import sys

import pytest

from llasa_jax import cli
from llasa_jax.cli import arguments
from llasa_jax.codec import DEFAULT_CODEC
from llasa_jax.data.importing import UNKNOWN_CODEC


def test_help_answers_at_once():
    command = [sys.executable, "-m", "llasa_jax.cli", "--help"]
    before = os.times()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    after = os.times()
    spent = after.children_user + after.children_system
    spent -= before.children_user + before.children_system
    assert "import-hf" in done.stdout
    assert spent < 0.3  # processor time, so that a busy machine does not fail the test


def test_help_imports_nothing_heavy():
    program = "import sys; from llasa_jax import cli; cli.new_parser(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert not {"numpy", "jax", "torch", "transformers"} & set(done.stdout.split())


def test_defaults_are_their_owners():
    assert arguments.DEFAULT_CODEC == DEFAULT_CODEC
    assert arguments.UNKNOWN_CODEC == UNKNOWN_CODEC


def test_settings_keep_their_order_and_reach_only_commands_that_take_them(capsys):
    settings = ["--config", "a.yaml", "--config=b.yaml", "--train.rows", "3", "--help"]
    args, rest = cli.new_parser().parse_known_args(["train", *settings])
    assert args.takes_settings
    assert rest == settings
    args, rest = cli.new_parser().parse_known_args(
        ["plan", "--config", "a.yaml", "--model.path=x", "--model", "1b", "--data.path", "y"]
    )
    assert (str(args.config), args.model, rest) == (
        "a.yaml",
        "1b",
        ["--model.path=x", "--data.path", "y"],
    )
    with pytest.raises(SystemExit) as stop:
        cli.main(["import-hf", "a", "b", "--train.rows=3"])
    assert stop.value.code == 2
    assert "unrecognized arguments: --train.rows=3" in capsys.readouterr().err
