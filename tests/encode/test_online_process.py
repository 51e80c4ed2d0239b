"""Online training as a process: stopped while its codec cannot be, killed, and gone on with from
the cache.
"""

import json
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import pytest
from counting_codec import CountingCodec
from places import FIXTURES, SPEECH, environment
from tiny_run import losses, make_model

from llasa_jax.convert.model_folder import saved_steps
from llasa_jax.encode.mixture import open_sources
from llasa_jax.encode.offline import encode
from llasa_jax.encode.online_cache import open_encoder
from llasa_jax.model.sharding import make_mesh
from llasa_jax.train import loop as train_module
from llasa_jax.train import prepare
from llasa_jax.train.parsing import parse_settings

STEPS = 7


def start(what, limit, *arguments):
    command = [sys.executable, FIXTURES / "online_run.py", what, str(limit), *arguments]
    return subprocess.Popen(
        list(map(str, command)),
        env=environment(1),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.filterwarnings("ignore:the loss is")
@pytest.mark.soak
def test_stopped_killed_and_gone_on_with(tmp_path, monkeypatch):
    lines = (SPEECH / "manifest.jsonl").read_text().splitlines()[:16]
    for line in lines:
        shutil.copy(SPEECH / json.loads(line)["audio"], tmp_path)
    manifest = tmp_path / "m.jsonl"
    manifest.write_text("\n".join(lines) + "\n")
    encode(manifest, tmp_path / "codes", CountingCodec())
    make_model(tmp_path / "model")
    settings = {
        "model": {"path": str(tmp_path / "model"), "dtype": "float32", "loss_chunk": 32},
        "data": {
            "max_length": 512,
            "doctor": "warn",
            "online": {"workers": 1, "queue": 1, "cache": str(tmp_path / "cache")},
        },
        "train": {"steps": STEPS, "rows": 1, "save_every": 2},
    }
    (tmp_path / "c.yaml").write_text(json.dumps(settings))
    common = ("train", "--config", tmp_path / "c.yaml")
    online = (
        *common,
        "--data.mode=online",
        f"--data.path={manifest}",
        f"--out={tmp_path / 'online'}",
    )

    child = start("stuck", 8, *online)
    said = ""
    while "stuck" not in said and child.poll() is None:
        said += child.stdout.readline()
    while not losses_so_far(tmp_path / "online") and child.poll() is None:
        time.sleep(0.1)
    child.send_signal(signal.SIGTERM)
    rest, complained = child.communicate(timeout=60)  # the codec would take 600
    assert child.returncode == 128 + signal.SIGTERM, said + rest + complained
    step = int(re.search(r"stopped by SIGTERM after step (\d), which is saved", rest)[1])
    assert saved_steps(tmp_path / "online")[-1] == step

    child = start("killed", 3, *online)
    said, complained = child.communicate(timeout=300)
    assert child.returncode == -signal.SIGKILL, said + complained
    assert f"going on after step {step}" in said

    # To the end here, on the one device that those processes had.
    monkeypatch.setattr(
        prepare, "make_mesh", lambda *_, **more: make_mesh(1, 1, 1, devices=jax.devices()[:1])
    )
    codec = CountingCodec()
    for arguments in (
        online,
        (*common, f"--data.path={tmp_path / 'codes'}", f"--out={tmp_path / 'offline'}"),
    ):
        settings = parse_settings([*map(str, arguments[1:])])
        records, validation = open_sources(settings.sources, settings.data.online)
        train_module.train(
            settings,
            records,
            validation,
            encoder=open_encoder(settings.data.online, records, validation, codec),
        )
    assert 0 < len(codec.seen) <= 16 - 8 - 2
    assert len(losses(tmp_path / "online")) == STEPS
    assert losses(tmp_path / "online") == losses(tmp_path / "offline")


def losses_so_far(run):
    return losses(run) if (run / "metrics.jsonl").is_file() else {}


def test_a_thread_inside_pytorch_does_not_spoil_the_end():
    """Python's own end aborts the process, with status 134, when the thread comes back from
    PyTorch.
    """
    program = """
import sys, threading, time, torch
from llasa_jax.runtime.signals import UNINTERRUPTIBLE, leave
began = threading.Event()
def work():
    a = torch.eye(1000)
    while True:
        a = torch.tanh(a @ a)
        began.set()
threading.Thread(target=work, daemon=True, name=UNINTERRUPTIBLE).start()
began.wait()
sys.exit(leave(7))
"""
    assert subprocess.run([sys.executable, "-c", program], timeout=100).returncode == 7
