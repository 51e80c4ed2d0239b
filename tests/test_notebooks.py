"""The notebooks: that of Kaggle runs here on the CPU, with a tiny model in place of the real one;
that of Colab has the same cells, but for how it is installed and set.
"""

import json
import os
import sys
from pathlib import Path

import nbclient
import nbformat
import pytest

from llasa_jax.demo.tiny import make_tiny_codec
from llasa_jax.demo.tiny_llama import make_tiny_llama, make_tiny_tokenizer

ROOT = Path(__file__).parents[1]
INSTALL, SETTINGS = 0, 1  # code cells


def read(name):
    notebook = nbformat.read(ROOT / "notebooks" / name, as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    return notebook


def code(notebook):
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def test_they_differ_in_what_they_install_and_set_alone():
    kaggle, colab = code(read("kaggle_tpu.ipynb")), code(read("colab.ipynb"))
    differ = [i for i, (one, other) in enumerate(zip(kaggle, colab, strict=True)) if one != other]
    assert differ == [INSTALL, SETTINGS]


@pytest.mark.parametrize("gpu", [False, True])
def test_the_settings_of_colab(monkeypatch, gpu):
    from llasa_jax.train.parsing import parse_settings

    monkeypatch.chdir(ROOT)
    for name in ("MODEL", "CODEC", "MANIFEST", "WORK", "CONFIG", "DEVICE", "MORE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/nvidia-smi" if gpu else None)
    given: dict = {}
    exec(code(read("colab.ipynb"))[SETTINGS], given)
    settings = parse_settings(
        [f"--config={given['CONFIG']}", *given["MORE"].split(), "--data.path=d", "--out=o"]
    )
    assert settings.lora.rank
    assert settings.model.dtype == ("float32" if gpu else "bfloat16")
    assert given["DEVICE"] == ("cuda" if gpu else "jax")


@pytest.mark.soak
def test_kaggle_runs(tmp_path, monkeypatch):
    clips = [
        json.loads(line) for line in (ROOT / "tests/speech/manifest.jsonl").read_text().splitlines()
    ]
    for clip in clips:
        clip["audio"] = str(ROOT / "tests/speech" / clip["audio"])
    (tmp_path / "manifest.jsonl").write_text("".join(f"{json.dumps(clip)}\n" for clip in clips))
    make_tiny_codec(tmp_path / "codec")
    make_tiny_llama(tmp_path / "hf", make_tiny_tokenizer())
    given = {
        "MODEL": tmp_path / "hf",
        "CODEC": tmp_path / "codec",
        "MANIFEST": tmp_path / "manifest.jsonl",
        "WORK": tmp_path,
        "CONFIG": "configs/demo.yaml",
        "DEVICE": "cpu",
        "MORE": "--train.steps=3 --data.validation_split=validation",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        # Of the kernel itself, whose history would be a file of the user's
        "IPYTHONDIR": tmp_path / "ipython",
    }
    for name, value in given.items():
        monkeypatch.setenv(name, str(value))
    notebook = read("kaggle_tpu.ipynb")
    resources = {"metadata": {"path": str(ROOT)}}
    nbclient.NotebookClient(notebook, timeout=600, resources=resources).execute()
    said = "".join(
        output.get("text", "")
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if output.output_type == "stream"
    )
    assert "error:" not in said, said
    assert "step 3: " in said
    assert (tmp_path / "hello.wav").is_file()
    assert (tmp_path / "release" / "model.safetensors").is_file()
