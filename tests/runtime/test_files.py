"""Files and folders: one guard for reading, whole or not at all when writing, sentences for I/O
errors.
"""

import errno
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import yaml

from llasa_jax.errors import UserError
from llasa_jax.runtime.files import explain, is_full, parse_json, read_json, read_text, read_yaml
from llasa_jax.runtime.writing import is_partial, new_file, write_whole

DAMAGE = {
    "cut short": b'{"a": [1, 2',
    "empty": b"",
    "a list": b"[1, 2]",
    "a number": b"5",
    "not UTF-8": '{"a": "é"}'.encode("latin-1"),
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "deep": b"[" * 100_000,
    "deep in an object": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "5,000 digits": b'{"a": ' + b"9" * 5000 + b"}",
    "too large for a float": b'{"a": 1e999}',
    "not a number": b'{"a": NaN}',
    "half a surrogate pair": b'{"a": "\\ud800"}',
    "NUL bytes": bytes(100),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_json_is_one_sentence(tmp_path, name):
    (path := tmp_path / "model.json").write_bytes(DAMAGE[name])
    with pytest.raises(UserError, match=r"model\.json: the description .*import it again$") as told:
        read_json(path, "the description", fix="import it again")
    assert "\n" not in str(told.value)
    assert len(str(told.value)) < 500


@pytest.mark.parametrize(
    "text",
    [
        "a: b: c",
        "a: [1, 2",
        "- 1",
        "5",
        "!!python/object/apply:os.system [ls]",
        "a: !!bool 5",
        "a: !!int ''",
        "a: !!timestamp x",
        "a: 2024-13-45",
        "a: " + "9" * 5000,
        "? [1, 2]\n: 3\n? {a: 1}\n: 2",
        "a: *nothing",
        "&a [*a]",
        "a: " + "[" * 1000,
        'a: "\\ud800"',
        "a: \x07",
        # A billion values in nine lines
        "a0: &a0 [1]\n"
        + "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)),
    ],
)
def test_damaged_yaml_is_one_sentence(tmp_path, text):
    (path := tmp_path / "settings.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError, match=r"settings\.yaml: the settings .*restore it$") as told:
        read_yaml(path, "the settings", fix="restore it")
    assert "\n" not in str(told.value)


def test_whole_files_are_read(tmp_path):
    (path := tmp_path / "x").write_bytes('\ufeff{"a": ["é", 1.5, "\\ud83d\\ude00"]}'.encode())
    assert read_json(path, "x") == {"a": ["é", 1.5, "\U0001f600"]}
    path.write_bytes('\ufeffa: ["é", 1.5, \U0001f600]'.encode())
    assert read_yaml(path, "x") == {"a": ["é", 1.5, "\U0001f600"]}
    path.write_text("")
    assert read_yaml(path, "x") == {}
    path.write_text("[1]")
    assert read_json(path, "x", list) == read_yaml(path, "x", list) == [1]


def test_what_is_no_regular_file(tmp_path):
    os.mkfifo(tmp_path / "fifo")  # nobody writes to it, so an unguarded read would wait for ever
    with pytest.raises(UserError, match="fifo: the text is a pipe or device, not a file"):
        read_text(tmp_path / "fifo", "the text")
    with pytest.raises(UserError, match="the text is a folder"):
        read_text(tmp_path, "the text")
    with pytest.raises(UserError, match="none: the text is missing; make it"):
        read_text(tmp_path / "none", "the text", fix="make it")
    with pytest.raises(UserError, match="the name is too long"):
        read_text(tmp_path / ("x" * 5000), "the text")
    with pytest.raises(UserError, match="NUL byte"):
        read_text("x\0y", "the text")
    (loop := tmp_path / "loop").symlink_to(loop)
    with pytest.raises(UserError, match="lead in a circle"):
        read_text(loop, "the text")
    (tmp_path / "large").write_bytes(bytes(101))
    with pytest.raises(UserError, match="is 101 bytes large, more than 100"):
        read_text(tmp_path / "large", "the text", limit=100)
    with pytest.raises(UserError, match="large, more than"):
        read_text(tmp_path / "large", "the text", limit=1)


def test_random_damage_never_is_a_traceback(tmp_path):
    """Every outcome is content of the right kind or a UserError that names the file."""
    random = np.random.default_rng(0)
    content = {"a": [1, 2.5, None, True], "b": {"c": "text", "d": "é"}, "e": {"f": [{}]}}
    sources = {read_json: json.dumps(content), read_yaml: yaml.safe_dump(content)}
    path, refused = tmp_path / "x", 0
    for number in range(400):
        read = [read_json, read_yaml][number % 2]
        data = bytearray(sources[read].encode())
        for _ in range(random.integers(1, 4)):
            at = int(random.integers(len(data)))
            data[at : at + int(random.integers(0, 3))] = random.bytes(int(random.integers(0, 3)))
        path.write_bytes(data)
        try:
            outcome = read(path, "it")
        except UserError as error:
            outcome = str(error)
        refused += isinstance(outcome, str)
        assert isinstance(outcome, dict) or str(path) in outcome
    assert refused > 100


def test_errors_of_the_system_are_sentences():
    for number in (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO, errno.EMFILE, errno.EXDEV):
        sentence = explain(OSError(number, os.strerror(number), "/data/x"))
        assert "/data/x" in sentence
        assert ";" in sentence
    assert "is full; make room" in explain(RuntimeError("x: No space left on device"), "/data")
    wrapped = RuntimeError("in a thread")
    wrapped.__cause__ = OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
    assert is_full(wrapped)
    assert explain(ValueError("a bug")) is None
    tensorstore = ValueError(
        'RESOURCE_EXHAUSTED: Error reading "embed/1.1" in OCDBT at local file "/m/": Failed'
        " to open: \"/m/d/0\": Too many open files [os_error_code='24'] [source locations='x.cc:1']"
    )
    assert "too many open files; raise the limit" in explain(tensorstore)
    assert explain(tensorstore).startswith("/m/")
    assert explain(OSError("no number"), "/x") == "/x: no number; check the path and the disk"


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x.wav"
    write_whole(path, "old")

    def fails():
        with new_file(path) as partial:
            assert is_partial(partial)
            assert partial.suffix == ".wav"
            partial.write_text("half")
            raise RuntimeError("on the way")

    with pytest.raises(RuntimeError, match="on the way"):
        fails()
    assert path.read_text() == "old"
    assert [*tmp_path.iterdir()] == [path]
    write_whole(path, b"new")
    assert path.read_bytes() == b"new"


def test_what_a_killed_process_left_beside_a_file_is_removed(tmp_path):
    path = tmp_path / "[x].yaml"
    program = (
        "import os, pathlib; from llasa_jax.runtime.writing import new_file\n"
        f"with new_file(pathlib.Path({str(path)!r})): os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == -9
    assert len([*tmp_path.iterdir()]) == 1
    write_whole(path, "whole")
    assert [*tmp_path.iterdir()] == [path]


def test_a_line_is_named():
    with pytest.raises(UserError, match=r"^m\.jsonl, line 3 is damaged, not valid JSON"):
        parse_json("{", "m.jsonl, line 3")
