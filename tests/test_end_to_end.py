"""The whole way, as a newcomer sees it: the demo on real speech, then what it leaves behind, read
by others' code alone.
"""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from llasa_jax.cli import main
from llasa_jax.demo import CODEC

ROOT = Path(__file__).parent.parent


def run(*arguments, **more):
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, **more
    )


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "out"
    finished = run("llasa_jax.demo", "--out", out)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return out, finished.stdout


def test_the_demo_proves_itself(demo):
    _, said = demo
    returned = [
        float(line.split(":")[1].split("%")[0])
        for line in said.splitlines()
        if line.startswith(("llasa-jax:", "transformers:"))
    ]
    assert len(returned) == 2
    assert min(returned) >= 99
    for command in ("import-hf", "encode", "train", "export-hf", "generate"):
        assert f"$ llasa-jax {command}" in said


def test_the_speech_is_understood(demo):
    _, said = demo
    understood = re.search(r"^(\d+)% of (\d+) words are understood$", said, re.M)
    assert int(understood[2]) == 40
    assert int(understood[1]) >= 80


def test_without_a_recogniser_the_demo_says_so(monkeypatch, capsys):
    from llasa_jax.demo import _listen

    monkeypatch.setitem(sys.modules, "pocketsphinx", None)
    _listen(Path("nowhere"), [])
    assert capsys.readouterr().out.startswith("not asked: ")


def test_the_release_needs_no_code_of_ours(demo):
    out, _ = demo
    program = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
assert not any(name.startswith("llasa_jax") for name in sys.modules)
assert model.config.architectures == ["LlamaForCausalLM"]
assert model.config.vocab_size == len(tokenizer)
assert model.config.tie_word_embeddings
end = tokenizer.convert_tokens_to_ids("<|SPEECH_GENERATION_END|>")
assert end in model.generation_config.eos_token_id
print(model.num_parameters())
"""
    finished = subprocess.run(
        [sys.executable, "-c", program, str(out / "release")], capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr
    start = json.loads((out / "hf" / "config.json").read_text())
    end = json.loads((out / "release" / "config.json").read_text())
    assert {name: end.get(name) for name in start} == start


def test_weights_changed_and_tokenizer_did_not(demo):
    from safetensors.torch import load_file

    out, _ = demo
    before, after = (
        load_file(out / "hf" / "model.safetensors"),
        load_file(out / "release" / "model.safetensors"),
    )
    assert before.keys() == after.keys()
    assert all(
        before[name].shape == after[name].shape and not torch.equal(before[name], after[name])
        for name in before
    )
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (out / "hf" / name).read_bytes() == (out / "release" / name).read_bytes()


def test_the_plan_counts_the_steps_that_training_takes(demo, capsys):
    out, said = demo
    places = (
        f"--model.path={out / 'model'}",
        f"--data.path={out / 'records'}",
        "--mesh.data=1",
        "--mesh.fsdp=1",
        "--mesh.tensor=1",
    )
    epochs = ("--train.steps=0", "--train.epochs=30")
    assert (
        main(
            [
                "plan",
                "--config",
                str(ROOT / "configs/demo.yaml"),
                "--topology",
                "h100:1",
                "--json",
                *places,
                *epochs,
            ]
        )
        == 0
    )
    rows = int(re.search(r"an epoch: 8 clips, \d+ tokens in (\d+) rows of 384", said)[1])
    assert json.loads(capsys.readouterr().out)["steps"] == math.ceil(30 * rows / 4)


def test_records_are_anybodys(demo):
    import tensorflow_datasets as tfds

    out, _ = demo
    builder = tfds.builder_from_directory(out / "records")
    assert {name: split.num_examples for name, split in builder.info.splits.items()} == {
        "train": 8,
    }
    record = builder.as_data_source("train")[0]
    assert record["codes"].dtype == np.uint16
    assert record["speaker"].decode() in ("slt", "rms")


def test_the_voice_is_audio(demo):
    out, _ = demo
    spoken = sorted((out / "spoken").glob("*.wav"))
    assert len(spoken) == 8
    for path in spoken:
        wave, rate = soundfile.read(path)
        recorded = soundfile.info(CODEC.parent / "speech" / f"{path.stem}.flac")
        assert rate == 16_000
        assert abs(len(wave) / rate - recorded.duration) < 0.1
        assert np.isfinite(wave).all()
        assert np.abs(wave).max() > 0.05


def test_losses_fall_in_the_metrics(demo):
    out, _ = demo
    lines = [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "loss" in line]
    # Chance over the tiny vocabulary is ln(66,500) = 11.1 nats.
    assert 10.5 < lines[0]["loss"] < 11.5
    assert lines[-1]["loss"] < 0.2


def test_the_same_training_command_goes_on(demo):
    out, _ = demo
    finished = run(
        "llasa_jax.cli", "train", "--config", "configs/demo.yaml",
        f"--out={out / 'run'}", f"--model.path={out / 'model'}", f"--data.path={out / 'records'}",
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    assert "going on after step" in finished.stdout


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["train", "--config", "configs/demo.yaml", "--train.row=3"], "unknown setting train.row"),
        (
            ["train", "--config", "configs/demo.yaml", "--data.path={out}/nowhere"],
            "no dataset of codes",
        ),
        (
            [
                "train",
                "--config",
                "configs/demo.yaml",
                "--data.path={out}/records",
                "--data.train_split=tests",
            ],
            "no split 'tests'",
        ),
        (["import-hf", "{out}/hf", "{out}/records"], "already exists and is not empty"),
        (["import-hf", str(CODEC), "{out}/new"], "model_type"),
        (["export-hf", "{out}/records", "{out}/new"], "holds no model"),
        (
            [
                "encode",
                "--manifest",
                str(CODEC.parent / "speech/manifest.jsonl"),
                "--out",
                "{out}/new",
                "--codec",
                "{out}/hf",
            ],
            "no codec",
        ),
        (
            ["generate", "--model", "{out}/run", "--text", "Hi", "--out", "{out}/records"],
            "is a folder",
        ),
        (
            [
                "generate",
                "--model",
                "{out}/records",
                "--text",
                "Hi",
                "--out",
                "{out}/x.wav",
                "--codec",
                str(CODEC),
            ],
            "holds no model",
        ),
    ],
)
def test_mistakes_get_one_sentence(demo, arguments, complaint, capfd, monkeypatch):
    out, _ = demo
    monkeypatch.chdir(ROOT)
    status = main([argument.format(out=out) for argument in arguments])
    complained = capfd.readouterr().err
    assert status == 2, complained
    said = [line for line in complained.splitlines() if line.startswith("llasa-jax: error: ")]
    assert len(said) == 1
    assert complaint in said[0]
    assert "Traceback" not in complained
    assert not (out / "new").exists()
