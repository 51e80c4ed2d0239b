"""Encoding on a Ray cluster of two nodes, one of which is killed. Where Ray is not installed these
are skipped: `pip install 'llasa-jax[ray]'` and run `pytest tests/encode/test_ray.py`.
"""

import functools
import os
import signal
import threading
import time

import pytest
from counting_codec import SlowCodec
from places import SPEECH

from llasa_jax.encode.offline import Job, encode_here
from llasa_jax.encode.on_ray import encode_on_ray
from llasa_jax.encode.sources import ManifestAudio
from llasa_jax.errors import UserError

ray = pytest.importorskip(
    "ray", reason="pip install 'llasa-jax[ray]', then pytest tests/encode/test_ray.py"
)
pytestmark = [
    pytest.mark.slow,
    # Ray's own
    pytest.mark.filterwarnings("ignore::FutureWarning:ray"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture(scope="module")
def cluster():
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
    )
    os.environ["RAY_ADDRESS"] = cluster.address
    yield cluster
    ray.shutdown()
    cluster.shutdown()
    del os.environ["RAY_ADDRESS"]


def a_job(out, codec):
    source = functools.partial(ManifestAudio, SPEECH / "manifest.jsonl", 0.2, 1)
    return Job(source, out, codec, workers=1, clips_a_file=3)


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.soak
def test_a_node_is_killed(tmp_path, cluster, capsys):
    encode_here(a_job(tmp_path / "here", SlowCodec(0.0)))
    node = cluster.add_node(num_cpus=1)

    def kill():
        time.sleep(6)
        raylet = node.all_processes["raylet"][0].process
        os.kill(raylet.pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    encode_on_ray(a_job(tmp_path / "out", SlowCodec(0.3)), cluster.address)
    killer.join()
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "here")
    said = capsys.readouterr().out
    assert "hours of speech done, about 0.00 left" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "out"]


def test_a_mistake_comes_from_a_task(tmp_path, cluster):
    with pytest.raises(UserError, match="no such codec folder"):
        encode_on_ray(a_job(tmp_path / "out", str(tmp_path / "none")), cluster.address)
