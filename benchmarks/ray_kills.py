"""Two Ray nodes on this machine encode the corpus of real speech while the second is killed with -9
at random moments and replaced: `python benchmarks/ray_kills.py`. The dataset must be byte-equal to
that of one process. Needs the extra `[ray]`. With `--bucket` it is made in a bucket, served here.

The codec is a stand-in that waits, so that kills meet all stages of many shards.
"""

import argparse
import contextlib
import functools
import os
import random
import signal
import sys
import tempfile
import threading
import time
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parents[1]
os.environ["PYTHONPATH"] = f"{ROOT}:{ROOT / 'tests/fixtures'}"
sys.path[:0] = os.environ["PYTHONPATH"].split(":")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--bucket", action="store_true")
    parser.add_argument("--seconds", type=float, default=4.0, help="that a batch takes")
    options = parser.parse_args()

    import ray
    from buckets import environment, served
    from counting_codec import SlowCodec
    from ray.cluster_utils import Cluster

    from llasa_jax.encode.offline import Job, encode_here
    from llasa_jax.encode.on_ray import encode_on_ray
    from llasa_jax.encode.sources import ManifestAudio
    from llasa_jax.runtime import storage

    print(f"{date.today()}, Python {sys.version.split()[0]}, ray {ray.__version__}", flush=True)
    source = functools.partial(ManifestAudio, ROOT / "tests/speech/manifest.jsonl", 0.2, 1)
    with contextlib.ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory())
        if options.bucket:  # before the cluster starts, whose processes have its address from here
            address = stack.enter_context(served("gs", Path(scratch)))
            os.environ |= environment("gs", address) | {"LLASA_JAX_CACHE": f"{scratch}/copies"}
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
        here, there = Path(scratch) / "here", Path(scratch) / "there"
        if options.bucket:
            there = storage.as_path("gs://bucket/there")
        job = Job(source, here, SlowCodec(0.0), workers=1, clips_a_file=2)
        encode_here(job)
        killed: list[float] = []
        rng, began = random.Random(0), time.monotonic()
        ray.init(address=cluster.address, log_to_driver=False)
        job = Job(source, there, SlowCodec(options.seconds), workers=1, clips_a_file=2)
        # Nodes can be started by the main thread alone.
        encoding = threading.Thread(target=encode_on_ray, args=(job, cluster.address))
        encoding.start()
        while encoding.is_alive() and len(killed) < options.kills:
            node = cluster.add_node(num_cpus=1)
            encoding.join(rng.uniform(2, 10))
            os.kill(node.all_processes["raylet"][0].process.pid, signal.SIGKILL)
            killed.append(time.monotonic() - began)
            cluster.remove_node(node, allow_graceful=False)  # from the cluster's own list
        cluster.add_node(num_cpus=1)
        encoding.join()
        files = {path.name: path.read_bytes() for path in here.iterdir()}
        equal = files == {path.name: path.read_bytes() for path in there.iterdir()}
        print(f"{len(killed)} kills, after {', '.join(f'{at:.1f}' for at in killed)} s")
        print(f"{len(files)} files, byte-equal to one process's: {equal}")
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
