"""A tiny run for tests to train, here or in a process of its own: `python tests/tiny_run.py MODEL OUT [EVENT WORD]`.

With EVENT and WORD the process kills itself, as `kill -9` does, at the first of Python's audit events EVENT that mentions WORD.
"""

import dataclasses
import json
import os
import signal
import sys

import numpy as np

from llasa_jax.prompts import Utterance
from llasa_jax.settings import DataSettings, LogSettings, MeshSettings, ModelSettings, OptimizerSettings, Settings, TrainSettings


def make_model(folder):
    from reference import config_of, hf_llama, params_of

    from llasa_jax import model_folder
    from llasa_jax.tiny_llama import make_tiny_tokenizer

    tokenizer = make_tiny_tokenizer()
    hf = hf_llama(vocab=len(tokenizer), initializer_range=0.02)
    model_folder.write_description(folder, config_of(hf), {"base_model": "tiny"})
    model_folder.save_params(folder, params_of(hf))
    tokenizer.save_pretrained(folder / "hf")
    return folder


def make_clips(count=12):
    rng = np.random.default_rng(0)
    return [Utterance(f"word {i}", rng.integers(0, 65_536, 10 + i).astype(np.uint16), f"clip{i}", "ada") for i in range(count)]


def settings_for(model, out, **changes):
    settings = Settings(
        out=str(out),
        model=ModelSettings(path=str(model), dtype="float32", loss_chunk=32),
        data=DataSettings(path="unused", max_length=128),
        mesh=MeshSettings(data=2, fsdp=2, tensor=2),
        optimizer=OptimizerSettings(learning_rate=1e-2),
        train=TrainSettings(steps=6, rows=4, save_every=2, validate_every=3),
        log=LogSettings(every=2),
    )
    for group, values in changes.items():
        settings = dataclasses.replace(settings, **{group: dataclasses.replace(getattr(settings, group), **values)})
    return settings


def lines_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run):
    return {line["step"]: line["loss"] for line in lines_of(run) if "loss" in line}


def main(model, out, event=None, word=None):
    def watch(what, details):
        if what == event and word in str(details):
            os.kill(os.getpid(), signal.SIGKILL)

    from llasa_jax.errors import UserError
    from llasa_jax.train import train

    if event:
        sys.addaudithook(watch)
    settings = settings_for(model, out, mesh={"data": 1, "fsdp": -1, "tensor": 1}, train={"keep": 1})
    try:
        train(settings, [make_clips()], [make_clips()[:3]])
    except UserError as error:
        sys.exit(f"UserError: {error}")


if __name__ == "__main__":
    main(*sys.argv[1:])
