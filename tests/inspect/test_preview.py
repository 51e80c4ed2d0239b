"""`llasa-jax preview`: ids and labels for programs, colours for people."""

import io
import json

import numpy as np
import pytest

from llasa_jax.cli import main
from llasa_jax.data.builder import write_dataset
from llasa_jax.encode.mixture import open_sources
from llasa_jax.inspect.preview import preview
from llasa_jax.speech.prompts import Prompter, Utterance
from llasa_jax.train.parsing import parse_settings


@pytest.fixture(scope="module")
def place(tokenizer, tmp_path_factory):
    """A recipe that mixes speech, with one clip too long, and a file of chat."""
    place = tmp_path_factory.mktemp("preview")
    tokenizer.save_pretrained(place / "model" / "hf")
    rng = np.random.default_rng(0)
    texts = {"speaker": "ada", "description": "", "language": ""}
    clips = [
        {
            "id": f"clip{i}",
            "text": f"word {i}",
            "codes": rng.integers(0, 65_536, 20 + 50 * i).astype(np.uint16),
        }
        | texts
        for i in range(4)
    ]
    write_dataset(place / "voice", {"train": clips}, {"codec": "none"})
    chat = {
        "id": "chat",
        "messages": [
            {"role": "user", "content": "Hi\x1b[2J"},
            {"role": "assistant", "content": "Ho"},
        ],
    }
    (place / "chat.jsonl").write_text(json.dumps(chat))
    (place / "recipe.yaml").write_text(
        f"out: unused\nmodel: {{path: {place / 'model'}, loss_chunk: 2}}\ndata:\n  max_length:"
        f" 200\n  sources:\n  - {{path: {place / 'voice'}, weight: 0.8}}\n  - {{path:"
        f" {place / 'chat.jsonl'}, weight: 0.2, prompt: {{task: chat}}}}\n"
    )
    return place


@pytest.mark.slow
def test_json_is_what_training_sees(place, tokenizer, capsys):
    assert (
        main(["preview", "--config", str(place / "recipe.yaml"), "--count", "100", "--json"]) == 0
    )
    out, err = capsys.readouterr()
    lines = {line["id"]: line for line in map(json.loads, out.splitlines())}
    assert set(lines) == {"clip0", "clip1", "clip2", "chat"}
    assert "clip3: longer than data.max_length=200, left out" in err
    settings = parse_settings(["--config", str(place / "recipe.yaml")])
    for record in open_sources(settings.sources)[0][0]:
        if record.id in lines:
            example = Prompter(tokenizer).example(record)
            assert lines[record.id]["input_ids"] == example.tokens.tolist()
            assert (
                lines[record.id]["labels"] == np.where(example.loss, example.tokens, -100).tolist()
            )
    learned = [token for token in lines["chat"]["labels"] if token != -100]
    assert tokenizer.decode(learned) == "Ho<|eot_id|>"


@pytest.fixture
def loaded(tokenizer, monkeypatch):
    """The tokenizer without the second that it takes to load."""
    monkeypatch.setattr("llasa_jax.inspect.preview.load_tokenizer", lambda folder: tokenizer)


def test_settings_can_be_overridden(place, tokenizer, loaded, capsys):
    override = f"--data.sources=[{{path: {place / 'voice'}, prompt: {{task: asr}}}}]"
    assert (
        main(
            [
                "preview",
                "--json",
                f"--config={place / 'recipe.yaml'}",
                "--count=1",
                override,
                "--data.max_length=1024",
            ]
        )
        == 0
    )
    (line,) = capsys.readouterr().out.splitlines()
    learned = [token for token in json.loads(line)["labels"] if token != -100]
    assert tokenizer.decode(learned).startswith("<|TEXT_GENERATION_START|>word")
    assert main(["preview", f"--config={place / 'recipe.yaml'}", "--data.pth=x"]) == 2
    assert "unknown setting data.pth" in capsys.readouterr().err
    assert main(["preview", f"--config={place / 'recipe.yaml'}", "--count=0"]) == 2
    assert "--count: must be at least 1 and at most 1,000,000 but is 0" in capsys.readouterr().err


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("kind", "no_color", "coloured"),
    [(Terminal, "", True), (Terminal, "1", False), (io.StringIO, "", False)],
)
def test_colours_are_for_terminals(place, loaded, monkeypatch, kind, no_color, coloured):
    monkeypatch.setenv("NO_COLOR", no_color)
    settings = parse_settings(["--config", str(place / "recipe.yaml")])
    records = [
        [Utterance("word", np.arange(50).astype(np.uint16), "clip")],
        open_sources(settings.sources)[0][1],
    ]
    out = kind()
    preview(settings, records, 5, out=out)
    text = out.getvalue()
    assert "== clip  tts from " in text
    assert "52 with loss" in text
    assert "<|TEXT_UNDERSTANDING_START|>word<|TEXT_UNDERSTANDING_END|>" in text
    assert "<|s_2|> ... 44 more ... <|s_47|><|s_48|><|s_49|>" in text.replace(
        "\x1b[32m", ""
    ).replace("\x1b[0m", "")
    assert ("\x1b[32m<|SPEECH_GENERATION_START|>\x1b[0m" in text) == coloured
    assert ("\x1b" in text) == coloured


def test_a_records_text_does_not_steer_the_terminal(place, loaded):
    only_chat = f"--data.sources=[{{path: {place / 'chat.jsonl'}, prompt: {{task: chat}}}}]"
    settings = parse_settings(["--config", str(place / "recipe.yaml"), only_chat])
    out = Terminal()
    preview(settings, open_sources(settings.sources)[0], 1, out=out)
    assert r"Hi\x1b[2J" in out.getvalue()
    assert "\x1b[2J" not in out.getvalue()
