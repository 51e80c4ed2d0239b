"""The command line: it answers quickly, and each option reaches the parser that owns it."""

import os
import resource
import subprocess
import sys

import pytest

from llasa_jax import cli
from llasa_jax.cli import arguments
from llasa_jax.codec import DEFAULT_CODEC
from llasa_jax.data.importing import UNKNOWN_CODEC
from llasa_jax.errors import printable


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
    assert (args.config, args.model, rest) == (
        ["a.yaml"],
        "1b",
        ["--model.path=x", "--data.path", "y"],
    )
    assert cli.main(["import-hf", "a", "b", "--train.rows=3"]) == 2
    assert "unrecognized arguments: --train.rows=3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, Ünïcode, 日本語\u3000, नमस्ते", "plain, Ünïcode, 日本語\u3000, नमस्ते"),
        ("\x1b[2J\x07\x7f\x9b", r"\x1b[2J\x07\x7f\x9b"),
        ("a\nb\tc\r", r"a\nb\tc\r"),
        ("\u202eabc\u2028\ud800", r"\u202eabc\u2028\ud800"),
    ],
)
def test_printable_escapes_what_steers_a_terminal(text, shown):
    assert printable(text) == shown


def test_errors_are_printable(capsys):
    assert cli.main(["train", "--config", "no\x1b[2Jthing.yaml"]) == 2
    assert r"no\x1b[2Jthing.yaml" in capsys.readouterr().err


def test_a_closed_pipe_and_a_fault_of_the_machine_end_in_a_sentence(monkeypatch, capsys):
    program = (
        "import sys; from llasa_jax import cli\n"
        "cli.inspect.report = lambda args: print('word ' * 100_000)\n"
        "sys.exit(cli.main(['report', 'x']))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141

    def fail(args):
        raise error

    monkeypatch.setattr(cli.inspect, "report", fail)
    error: Exception = PermissionError(13, "Permission denied", "page.html")
    assert cli.main(["report", "x"]) == 2
    assert capsys.readouterr().err.startswith("llasa-jax: error: page.html: permission denied;")
    error = RuntimeError("write() failed: No space left on device; at byte 16384")
    assert cli.main(["report", "x"]) == 2
    assert "is full; make room" in capsys.readouterr().err
    error = RuntimeError("a mistake of ours")
    with pytest.raises(RuntimeError):
        cli.main(["report", "x"])


def test_limits_that_are_too_low_are_told_before_anything_is_imported(monkeypatch, capsys):
    monkeypatch.setattr("resource.getrlimit", lambda _: (2 << 30, -1))
    assert cli.main(["train"]) == 2
    assert "2.1 GB of addresses" in capsys.readouterr().err
    files = {resource.RLIMIT_AS: (-1, -1), resource.RLIMIT_NOFILE: (24, 4096)}
    monkeypatch.setattr("resource.getrlimit", files.get)
    assert cli.main(["train"]) == 2
    assert "may open 24 files at a time" in capsys.readouterr().err
    monkeypatch.setattr("resource.getrlimit", lambda _: (-1, -1))
    assert cli.main(["train"]) == 2
    assert "model.path is not set" in capsys.readouterr().err


ENCODE = ["encode", "--manifest=m.jsonl", "--out=d"]
GENERATE = ["generate", "--model=m", "--text=a", "--out=a.wav"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([*ENCODE, "--batch-seconds=nan"], "argument --batch-seconds: must be at least 1"),
        ([*ENCODE, "--workers=100000"], "argument --workers: must be at least 1 and at most 256"),
        ([*ENCODE, "--seed=-1"], "argument --seed: must be at least 0"),
        ([*ENCODE, "--validation-share=1"], "argument --validation-share: must be at least 0"),
        ([*ENCODE, "--device=nope"], "argument --device: 'nope' is not a device"),
        (["import-codes", "a", "b", "c", "--codec-name="], "'' is not a name"),
        (["import-codes", "a", "b", "c", "--code-offset=1e20"], "'1e20' is not a whole number"),
        (["plan", "--config=c", "--speech-hours=-1"], "argument --speech-hours: must be above 0"),
        (["plan", "--config=c", "--rows-per-device=0"], "--rows-per-device: must be at least 1"),
        ([*GENERATE, "--max-seconds=1e9"], "argument --max-seconds: must be at least 0 and"),
        ([*GENERATE, "--repetition-penalty=1e30"], "argument --repetition-penalty: must be above"),
        ([*GENERATE, "--top-p=0"], "argument --top-p: must be above 0 and at most 1"),
        (["plan", "--config=c", "--model="], "argument --model: '' is not 1b, 3b, 8b"),
        (["export-hf", "a", "b", "--max-shard-size=1B"], "--max-shard-size: must be at least 1MB"),
        (["export-hf", "a", "b", "--max-shard-size=5 x"], "'5 x' is no size of a file"),
        (["export-hf", "a", "b", "--push-to-hub="], "--push-to-hub: '' is not a repository"),
        (["export-hf", "a", "b", "--public"], "give it with --push-to-hub"),
        (["import-hf-dataset", "a", "b", "--columns=c", "--subset="], "--subset: '' is not a name"),
        (["speak"], "invalid choice: 'speak'"),
        ([], "the following arguments are required: COMMAND"),
    ],
)
def test_options_out_of_range_are_refused_in_a_sentence(arguments, said, capsys):
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
