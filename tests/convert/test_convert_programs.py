"""The programs in convert/ at the top of the repository, run by path as a user does."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llasa_jax.convert.import_hf import import_hf
from llasa_jax.convert.model_folder import open_model
from llasa_jax.convert.names import HEAD
from llasa_jax.convert.pickles import pickle_to_safetensors
from llasa_jax.demo.tiny_llama import make_tiny_llama, make_tiny_tokenizer
from llasa_jax.errors import UserError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text") / "hf"
    make_tiny_llama(folder, make_tiny_tokenizer(extend=False), dtype="bfloat16")
    return folder


def program(name, *arguments):
    return subprocess.run(
        [sys.executable, ROOT / "convert" / name, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )


def test_in_and_out_by_path(hf, tmp_path):
    finished = program("hf_to_flax.py", hf, tmp_path / "model")
    assert finished.returncode == 0, finished.stderr
    finished = program("flax_to_hf.py", tmp_path / "model", tmp_path / "out")
    assert finished.returncode == 0, finished.stderr
    before, after = (load_file(folder / "model.safetensors") for folder in (hf, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    finished = program("flax_to_hf.py", tmp_path, tmp_path / "nothing")
    assert finished.returncode == 2
    assert "holds no model" in finished.stderr
    assert "Traceback" not in finished.stderr


def test_pickles_become_safetensors_that_are_read(hf, tmp_path):
    """A sharded checkpoint as transformers wrote it, with a tied head that shares memory."""
    tensors = load_file(hf / "model.safetensors")
    tensors[HEAD] = tensors["model.embed_tokens.weight"]
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    for file in hf.iterdir():
        if file.suffix != ".safetensors":
            (pickled / file.name).write_bytes(file.read_bytes())
    names = sorted(tensors)
    parts = {"pytorch_model-00001-of-00002.bin": names[:7]}
    parts["pytorch_model-00002-of-00002.bin"] = names[7:]
    for file, members in parts.items():
        torch.save({name: tensors[name] for name in members}, pickled / file)
    weight_map = {name: file for file, members in parts.items() for name in members}
    index = pickled / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    finished = program("pickle_to_safetensors.py", pickled, tmp_path / "out")
    assert finished.returncode == 0, finished.stderr
    assert not [file for file in (tmp_path / "out").iterdir() if "bin" in file.name]
    import_hf(tmp_path / "out", tmp_path / "model")
    import_hf(hf, tmp_path / "expected")
    models = [open_model(tmp_path / name) for name in ("model", "expected")]
    assert models[0].fingerprint() == models[1].fingerprint()
    AutoModelForCausalLM.from_pretrained(tmp_path / "out", use_safetensors=True)


def test_one_file_of_a_trainer(tmp_path):
    whole = torch.arange(12.0).reshape(3, 4)
    content = {"state_dict": {"a": whole[1:], "b": whole.T}, "epoch": 3}
    torch.save(content, tmp_path / "last.ckpt")
    torch.save({"a": whole}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    pickle_to_safetensors(tmp_path / "last.ckpt", tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(found["a"], whole[1:])
    assert torch.equal(found["b"], whole.T)
    pickle_to_safetensors(tmp_path / "old.pt", tmp_path / "old")
    assert torch.equal(load_file(tmp_path / "old" / "model.safetensors")["a"], whole)


class RunsCode:
    def __reduce__(self):
        return (os.mkdir, ("it-ran",))


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (lambda path: torch.save({"a": RunsCode()}, path), "holds more than tensors"),
        (lambda path: path.write_bytes(pickle.dumps(RunsCode())), "holds more than tensors"),
        (lambda path: path.write_bytes(b"PK\x03\x04 damaged"), "holds more than|is damaged"),
        (lambda path: path.write_bytes(b""), "is damaged"),
        (lambda path: torch.save({"a": 3}, path), "holds no state dict"),
        (lambda path: torch.save([torch.ones(2)], path), "holds no state dict"),
        (lambda path: None, "does not exist"),
    ],
)
def test_anything_else_is_refused_in_one_sentence(tmp_path, monkeypatch, content, complaint):
    monkeypatch.chdir(tmp_path)
    content(tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=complaint) as error:
        pickle_to_safetensors(tmp_path / "pytorch_model.bin", tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "it-ran").exists()
    assert not (tmp_path / "out").exists()
