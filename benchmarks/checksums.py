"""What do checksums cost when a checkpoint is saved and restored? `python benchmarks/checksums.py`.

A model of Llama-3.2-1B's form with fewer layers and a smaller vocabulary, in float32 with AdamW's
state: 3 x 4 bytes a parameter. Saving is timed until everything is on disk, restoring until the
arrays are on the devices; both with the checksums, whose own time is measured beside. Writes
3 x 4 x --millions MB below --folder, removed at the end.
"""

import argparse
import datetime
import os
import platform
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median

import grain
import jax

from llasa_jax.model.checksum import checksums
from llasa_jax.train.checkpoints import Checkpoints, all_finite

MUST_STAY_BELOW = 0.02
D, MLP, KV = 2048, 8192, 512
LAYER = 2 * D * D + 2 * D * KV + 3 * D * MLP  # parameters of a layer


def make_tree(millions: int, seed: int) -> dict:
    """Weights of whole layers and of a table that fills the rest up, about `millions` million."""
    layers = max(1, millions * 10**6 // LAYER)
    shapes = {
        "layers": {
            "q": (layers, D, D),
            "o": (layers, D, D),
            "k": (layers, D, KV),
            "v": (layers, D, KV),
            "gate": (layers, D, MLP),
            "up": (layers, D, MLP),
            "down": (layers, MLP, D),
        },
        "embed": (max(1, (millions * 10**6 - layers * LAYER) // D), D),
    }
    leaves, structure = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return structure.unflatten(map(jax.random.normal, keys, leaves))


def seconds(work) -> tuple[float, float]:
    """By the clock, and of all processors."""
    began = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - began[0], time.process_time() - began[1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--millions", type=int, default=120, help="parameters")
    parser.add_argument("--repeat", type=int, default=3, help="the median counts")
    parser.add_argument("--folder", type=Path, help="on the disk to write to")
    args = parser.parse_args()
    device = jax.devices()[0]
    params = make_tree(args.millions, 0)
    opt_state = {"mu": make_tree(args.millions, 1), "nu": make_tree(args.millions, 2)}
    size = sum(leaf.nbytes for leaf in jax.tree.leaves((params, opt_state)))
    stream = grain.MapDataset.range(100).to_iter_dataset()
    data = iter(grain.experimental.ZipIterDataset([stream]))  # as training's, of one stream
    print(
        f"{datetime.date.today()}, {device.device_kind}, {os.cpu_count()}-core"
        f" {platform.machine()}; jax {version('jax')}, orbax-checkpoint"
        f" {version('orbax-checkpoint')}; load {os.getloadavg()[0]:.1f}"
    )

    def check():
        checksums(params)
        checksums(opt_state)

    def look():
        all_finite(params)

    check()
    look()  # both compile
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        saving, restoring, sums, finite = [], [], [], []
        for i in range(args.repeat):
            run = Path(scratch) / str(i)

            def save(run=run):
                with Checkpoints(run, 1) as checkpoints:
                    checkpoints.save(1, params, opt_state, data)

            def restore(run=run):
                like = jax.tree.map(
                    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
                    (params, opt_state),
                )
                with Checkpoints(run, 1) as checkpoints:
                    jax.block_until_ready(checkpoints.restore(*like, data)[1:])

            saving.append(seconds(save))
            restoring.append(seconds(restore))
            sums.append(seconds(check))
            finite.append(seconds(look))
    print(f"{size / 1e9:.2f} GB of weights and optimizer state in {args.repeat} rounds, medians:")
    print(f"{'':10} {'seconds':>10} {'CPU seconds':>12}")
    shares = []
    parts = {"saving": saving, "restoring": restoring, "checksums": sums, "finiteness": finite}
    for name, rounds in parts.items():
        clock, cpu = (median(values) for values in zip(*rounds, strict=True))
        print(f"{name:10} {clock:10.2f} {cpu:12.2f}")
        shares.append((clock, cpu))
    for what, i in (("seconds", 0), ("CPU seconds", 1)):
        share = shares[2][i] / shares[0][i]
        print(f"checksums are {share:.1%} of saving's {what} ({MUST_STAY_BELOW:.0%} asked for)")


if __name__ == "__main__":
    main()
