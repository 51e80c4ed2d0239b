"""A file of lines to a folder: what is accepted, and `kill -9` at any moment."""

import json
import os
import random
import signal
import sys

import numpy as np
import pytest

from llasa_jax import cli
from llasa_jax.errors import UserError
from llasa_jax.generate.files import read_lines, speak_lines
from llasa_jax.generate.speaker import Line, Speech
from llasa_jax.speech.audio import read_audio

ABOUT = {"model": "m", "sampling": {"seed": 0}}
COUNT, KILLS = 40, 5


def speech_of(line: Line) -> Speech:
    codes = np.full(5, int(line.id), np.uint16)
    return Speech(codes, np.repeat(codes / 1000, 320).astype(np.float32), True, 6, -1.0)


def scripted(lines):
    """Three at a time, which end in another order than they began."""
    for start in range(0, len(lines), 3):
        for place in reversed(range(start, min(start + 3, len(lines)))):
            yield place, speech_of(lines[place])


LINES = [Line(f"text {number}", id=str(number)) for number in range(1, COUNT + 1)]


def speak_until_killed(out, operation: int) -> int:
    """In a process of its own, which gets SIGKILL at a file operation. Returns the signal, or 0."""
    child = os.fork()
    if child == 0:
        left = operation

        def watch(event, details):
            nonlocal left
            if event in ("os.rename", "os.remove", "open", "os.mkdir") and str(out) in str(details):
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        speak_lines(scripted, LINES, out, ABOUT, codes=True)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning", "ignore:.*fork.*:RuntimeWarning")
def test_each_line_is_spoken_once_whenever_the_process_is_killed(tmp_path, capsys):
    out, draw, kills = tmp_path / "out", random.Random(0), 0
    while kills < KILLS:
        before = {path.name: path.stat().st_mtime_ns for path in out.glob("[!.]*.wav")}
        assert speak_until_killed(out, draw.randint(0, 70)) == signal.SIGKILL
        kills += 1
        # What was there stays as it is: no line is spoken again.
        for name, changed in before.items():
            assert (out / name).stat().st_mtime_ns == changed
    assert 0 < len(list(out.glob("[!.]*.wav"))) < COUNT
    left = COUNT - len(list(out.glob("[!.]*.wav")))
    assert speak_lines(scripted, LINES, out, ABOUT, codes=True) == left
    records = [json.loads(line) for line in (out / "lines.jsonl").read_text().splitlines()]
    assert sorted(record["id"] for record in records) == sorted(line.id for line in LINES)
    files = [f"{line.id}.{suffix}" for line in LINES for suffix in ("wav", "npy")]
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [*files, "lines.jsonl", "settings.json"]
    )
    for line, record in zip(LINES, sorted(records, key=lambda r: int(r["id"])), strict=True):
        expected = speech_of(line)
        np.testing.assert_array_equal(np.load(out / f"{line.id}.npy"), expected.codes)
        np.testing.assert_allclose(read_audio(out / f"{line.id}.wav"), expected.wave, atol=1e-4)
        assert (record["text"], record["codes"], record["seconds"]) == (line.text, 5, 0.1)
    assert speak_lines(scripted, LINES, out, ABOUT) == 0
    assert "40 of 40 lines are spoken already" in capsys.readouterr().out


def test_a_folder_is_not_mixed(tmp_path):
    speak_lines(scripted, LINES[:2], tmp_path, ABOUT)
    with pytest.raises(UserError, match="speech of other settings \\(sampling\\)"):
        speak_lines(scripted, LINES, tmp_path, ABOUT | {"sampling": {"seed": 1}})
    with pytest.raises(UserError, match="1.wav says another text than the line 1 has now"):
        speak_lines(scripted, [Line("new", id="1")], tmp_path, ABOUT)


def test_a_line_without_speech_is_tried_again(tmp_path, capsys):
    silent = Speech(np.empty(0, np.uint16), np.empty(0, np.float32), True, 1, 0.0)
    assert speak_lines(lambda lines: [(0, silent)], LINES[:1], tmp_path, ABOUT) == 0
    assert "1 lines have no speech" in capsys.readouterr().out
    assert speak_lines(scripted, LINES[:1], tmp_path, ABOUT) == 1


def test_lines_of_a_file(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text(
        '{"text": "one", "speaker": null}\n{"text": "two", "id": "b", "speaker": "x"}\n'
    )
    one, two = read_lines(path, {"speaker": "ada", "language": "en"})
    assert (one.id, one.text, one.speaker, one.language) == ("000001", "one", "ada", "en")
    assert (two.id, two.speaker) == ("b", "x")
    path.write_text('{"text": "one", "prompt_audio": "a.wav", "prompt_text": "hi"}\n')
    assert read_lines(path, {})[0].prompt_audio == tmp_path / "a.wav"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no lines"),
        ("{", "line 1 is damaged"),
        ('{"txt": "one"}', "line 1: unknown keys txt"),
        ('{"text": 5}', "line 1: text is not a text"),
        ('{"text": "a", "id": "../a"}', "makes no name of a file"),
        ('{"text": "a", "id": "x"}\n{"text": "b", "id": "x"}', "the ids x stand there"),
        ('{"text": "a", "prompt_text": "b"}', "line 1: prompt text was given without"),
    ],
)
def test_bad_lines_are_refused_by_name(tmp_path, content, message):
    path = tmp_path / "lines.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        read_lines(path, {})
    with pytest.raises(UserError, match="no such file"):
        read_lines(tmp_path / "absent.jsonl", {})


@pytest.mark.slow
def test_the_command_goes_on_where_it_stopped(folder, codec, tmp_path, capsys):
    path, out = tmp_path / "lines.jsonl", tmp_path / "out"
    path.write_text("".join(f'{{"text": "dog {number}"}}\n' for number in range(5)))
    words = ["generate", f"--model={folder}", f"--lines={path}", f"--out={out}", "--rows=2"]
    words += [f"--codec={codec}", "--dtype=float32", "--max-seconds=0.3"]
    assert cli.main(words) == 0
    assert "5 of 5 lines in" in capsys.readouterr().out
    first = (out / "000001.wav").read_bytes()
    (out / "000002.wav").unlink()
    assert cli.main(words) == 0
    assert "4 of 5 lines are spoken already" in capsys.readouterr().out
    assert (out / "000001.wav").read_bytes() == first
    assert cli.main([*words, "--seed=1"]) == 2
    assert "speech of other settings (SamplingSettings)" in capsys.readouterr().err
