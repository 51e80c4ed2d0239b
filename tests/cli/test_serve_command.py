"""The command serve: from a folder and options to the application, and its refusals."""

import socket

import pytest
from fastapi.testclient import TestClient

from llasa_jax import cli
from llasa_jax.demo.tiny import make_tiny_codec
from llasa_jax.demo.tiny_llama import make_tiny_llama
from llasa_jax.serve import server


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "small"
    make_tiny_llama(folder, tokenizer, hidden_size=16, num_hidden_layers=1)
    make_tiny_codec(folder / "codec")
    return folder


def test_a_folder_is_served(folder, monkeypatch, capsys):
    answers = {}

    def ask(app, where):
        with TestClient(app) as client:
            headers = {"authorization": "Bearer secret"}
            answers["models"] = client.get("/v1/models", headers=headers).json()
            answers["voices"] = client.get("/v1/audio/voices", headers=headers).json()
            answers["refused"] = client.get("/v1/models").status_code

    monkeypatch.setattr(server, "run", ask)
    monkeypatch.setenv("LLASA_JAX_API_KEY", "secret")
    options = ["--rows=2", "--port=0", "--max-seconds=0.3", "--speaker=ada", "--dtype=float32"]
    assert cli.main(["serve", str(folder), f"--codec={folder / 'codec'}", *options]) == 0
    assert [model["id"] for model in answers["models"]["data"]] == ["small"]
    assert answers["voices"] == {"voices": ["default", "ada"], "uploaded": []}
    assert answers["refused"] == 401
    assert "serving small at http://127.0.0.1:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--adapter=soft"], "give NAME=DIR"),
        (["--adapter=a=x", "--adapter=a=y"], "same name"),
        (["--adapter=ada=x", "--speaker=ada"], "same name"),
        (["--host=no.such.host.invalid"], "cannot listen there"),
    ],
)
def test_what_cannot_be_served(folder, options, sentence, capsys):
    assert cli.main(["serve", str(folder), *options]) == 2
    assert sentence in capsys.readouterr().err


def test_a_port_in_use_is_refused(folder, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert cli.main(["serve", str(folder), f"--port={port}"]) == 2
    assert "cannot listen there" in capsys.readouterr().err
