"""Job files and images: they parse, their commands parse with our own parser, and what they copy,
install or start is there.
"""

import re
import shlex
import subprocess
import tomllib
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml

from llasa_jax import cli
from llasa_jax.train.parsing import parse_settings

ROOT = Path(__file__).parents[1]
JOBS = ROOT / "docs" / "jobs"
IMAGES = sorted((ROOT / "docker").iterdir())
VALUES = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1", "BUCKET": "gs://bucket"}


def settings_of(command, monkeypatch):
    """The settings of a `llasa-jax train` command line, in which the shell has put its values."""
    monkeypatch.chdir(ROOT)
    command = re.sub(r"\$\(echo [^)]*\)", "10.0.0.1", command)
    command = re.sub(r"\$\{?(\w+)\}?", lambda name: VALUES[name[1]], command)
    words = shlex.split(command.replace("\\\n", " "))
    assert words.pop(0).endswith("llasa-jax")
    args, settings = cli.new_parser().parse_known_args(words)
    assert args.command == "train"
    return args, parse_settings(settings)


def shell_command(text):
    """The train command in a script, with the lines that it goes on in."""
    (found,) = re.findall(r"^(?:srun )?(\S*llasa-jax train(?:.*\\\n)*.*)$", text, re.M)
    return found


def test_gke(monkeypatch):
    job = yaml.safe_load((JOBS / "gke_v5e_4x4.yaml").read_text())
    (slice_,) = job["spec"]["replicatedJobs"]
    spec = slice_["template"]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    rows, columns = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert spec["parallelism"] == spec["completions"] == rows * columns // chips
    # The image has the recipes where it was built.
    inside = "/opt/llasa-jax/"
    assert f"WORKDIR {inside.rstrip('/')}\n" in (ROOT / "docker" / "Dockerfile.tpu").read_text()
    command = shlex.join(["llasa-jax", *container["args"]]).replace(inside, "")
    _, settings = settings_of(command, monkeypatch)
    assert settings.mesh.joins
    assert settings.train.rows % (rows * columns) == 0


def test_skypilot(monkeypatch):
    job = yaml.safe_load((JOBS / "sky.yaml").read_text())
    subprocess.run(["bash", "-n"], input=job["setup"] + job["run"], text=True, check=True)
    args, settings = settings_of(shell_command(job["run"]), monkeypatch)
    assert args.resume_loop
    assert settings.mesh.coordinator == "10.0.0.1:12355"
    assert settings.mesh.process_count == settings.mesh.slices == job["num_nodes"]
    assert settings.mesh.process_index == 1
    assert set(VALUES) - set(job["envs"]) == {"SKYPILOT_NUM_NODES", "SKYPILOT_NODE_RANK"}


def test_slurm(monkeypatch):
    script = (JOBS / "slurm.sh").read_text()
    subprocess.run(["bash", "-n", JOBS / "slurm.sh"], check=True)
    given = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", script, re.M))
    _, settings = settings_of(shell_command(script), monkeypatch)
    assert settings.mesh.joins
    assert settings.mesh.slices == settings.mesh.data == int(given["nodes"])
    assert settings.mesh.fsdp == int(given["gpus-per-node"])
    assert given["ntasks-per-node"] == "1"
    assert given["signal"].startswith("USR1")


def test_systemd(monkeypatch):
    service = ConfigParser(strict=False)
    service.optionxform = str
    service.read(JOBS / "llasa-jax.service")
    settings_of(service["Service"]["ExecStart"], monkeypatch)
    assert service["Service"]["Restart"] == "on-failure"


@pytest.mark.parametrize("image", IMAGES, ids=lambda path: path.name)
def test_images(image):
    text = image.read_text()
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    for line in re.findall(r"^COPY (.*)$", text, re.M):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists()
            assert f"!{source}" in ignored
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (installed,) = re.findall(r"'\.\[([\w,]+)\]'", text)
    assert set(installed.split(",")) <= extras["optional-dependencies"].keys()
    assert 'ENTRYPOINT ["llasa-jax"]' in text
    assert ("UV_TORCH_BACKEND=cpu" in text) == installed.startswith("tpu")


def test_there_are_jobs():
    assert len(list(JOBS.iterdir())) == 4
    assert len(IMAGES) == 2
