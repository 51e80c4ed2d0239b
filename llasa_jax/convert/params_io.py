"""Our weights on disk: written piece by piece by a conversion, read piece by piece by an export,
and read straight into their shards by whoever computes with them.

Written is zarr v2 without compression, a folder for each parameter, in the layout of an Orbax
checkpoint with `use_ocdbt=False`. A chunk is one layer's, or some rows of a table's, and an eighth
of D, so that a sharded read takes little beyond what each device holds. Read is any Orbax
checkpoint of ours, a training run's as well.

Beside the weights lie their checksums (`llasa_jax.model.checksum`): in `params/checksums.json` of a
model, in the `about` of a run's checkpoint. Every reader compares them.
"""

import json
import math
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import jax
import numpy as np
import tensorstore as ts

from llasa_jax.convert.names import our_axes, our_shapes
from llasa_jax.errors import UserError, first_line
from llasa_jax.model.checksum import checksum, checksums, compare
from llasa_jax.model.config import ModelConfig
from llasa_jax.model.quantize import Quantized
from llasa_jax.runtime.faults import is_passing
from llasa_jax.runtime.files import explain, is_full, read_json
from llasa_jax.runtime.library_path import library_path
from llasa_jax.runtime.storage import absolute, key_value_store, reaching

ABOUT, CHECKSUMS = "about", "checksums.json"
D_CHUNKS = 8  # the devices of one host: the usual size of the `fsdp` axis, which D is split over
PIECE_BYTES = 16 << 20  # of a table, read or written at a time
MODULUS = 1 << 32  # of checksums
WORKERS = 2  # threads, each with two pieces of a parameter in memory


class Reader(Protocol):
    """Weights in our layout that can be read: ours, a Hugging Face checkpoint's, or merged ones.

    `dtypes` gives the stored type by path. `pieces` gives all of one parameter along its first
    dimension, each piece with the index where it starts; rows of padding may be left out.
    """

    dtypes: dict[str, np.dtype]

    def pieces(self, path: str) -> Iterator[tuple[int, np.ndarray]]: ...


class ShardReader(Protocol):
    """Weights that can be read straight into shards: ours, or a Hugging Face checkpoint's."""

    def onto(self, path: str, target: jax.ShapeDtypeStruct) -> jax.Array: ...


class ParamsWriter:
    """Writes the parameters of `config` into the new folder `where`, each in its dtype of `dtypes`
    (by path), from several threads at once. A context, which writes the checksums at its end.
    """

    def __init__(self, where: Path, config: ModelConfig, dtypes: dict[str, np.dtype]):
        self._where, self._axes, self._shapes = where, our_axes(config), our_shapes(config)
        self._dtypes, self._lock = dtypes, threading.Lock()
        self._sums = {
            path: [0] * (self._shapes[path][0] if axes[0] == "L" else 1)
            for path, axes in self._axes.items()
        }
        where.mkdir(parents=True)
        self._alias = library_path(where)  # lasts as long as this object
        self._folder = self._alias.__enter__()
        self._arrays = {path: self._create(path) for path in self._shapes}
        tree = {
            str(tuple(path.split("."))): {
                "key_metadata": [{"key": key, "key_type": 2} for key in path.split(".")],
                "value_metadata": {
                    "value_type": "jax.Array",
                    "skip_deserialize": False,
                    "write_shape": shape,
                },
            }
            for path, shape in self._shapes.items()
        }
        # With this file Orbax reads the folder as a checkpoint of its own.
        (where / "_METADATA").write_text(
            json.dumps(
                {
                    "tree_metadata": tree,
                    "use_ocdbt": False,
                    "use_zarr3": False,
                    "store_array_data_equal_to_fill_value": True,
                    "custom_metadata": None,
                }
            )
        )

    def _create(self, path: str) -> ts.TensorStore:
        spec = {
            "driver": "zarr",
            "kvstore": key_value_store(f"{self._folder}/{path}"),
            "metadata": {"chunks": self._chunks(path), "compressor": None},
            "store_data_equal_to_fill_value": True,
        }
        dtype = self._dtypes[path].name
        return ts.open(spec, create=True, dtype=dtype, shape=self._shapes[path]).result()

    def _chunks(self, path: str) -> tuple[int, ...]:
        """Each divides its dimension: Orbax's own rule."""
        axes, shape = self._axes[path], self._shapes[path]
        chunks = [1 if letter == "L" else size for letter, size in zip(axes, shape, strict=True)]
        if len(axes) > 1 and axes != "LD":
            d = axes.index("D")
            chunks[d] //= math.gcd(chunks[d], D_CHUNKS)
        if axes == "VD":
            chunks[0] = self.rows(path)
        return tuple(chunks)

    def rows(self, path: str) -> int:
        """How many rows of a table make a piece: a divisor of V, of about `PIECE_BYTES`."""
        count, width = self._shapes[path]
        most = max(1, PIECE_BYTES // (width * self._dtypes[path].itemsize))
        return max(n for n in range(1, min(count, most) + 1) if count % n == 0)

    def write(self, path: str, piece: np.ndarray, index: int | None) -> None:
        """Writes the layer `index`, the `index`-th piece of `rows` rows of a table, or all of a
        parameter that has neither (None).

        `piece` is in our shape and the parameter's dtype. OSError where the disk is full.
        """
        array, axes = self._arrays[path], self._axes[path]
        if axes[0] == "L":
            assert index is not None
            target, at, start = array[index], index, 0
        else:
            first = (index or 0) * len(piece)
            target, at = array[first : first + len(piece)], 0
            start = first * math.prod(piece.shape[1:])
        try:
            target.write(piece).result()
        except ValueError as error:
            if is_full(error):
                raise OSError(str(error)) from error
            raise
        part = checksum(piece, start)
        with self._lock:
            self._sums[path][at] = (self._sums[path][at] + part) % MODULUS

    def __enter__(self) -> "ParamsWriter":
        return self

    def __exit__(self, kind, *error) -> None:
        if kind is None:
            write_checksums(self._where, self._sums)


class ParamsReader:
    """The parameters in an Orbax checkpoint of ours, wherever and however sharded they were saved.

    `shapes` are the shapes that are expected, by path; `dtypes` gives the stored type by path.
    UserError where a parameter is missing, misshapen or damaged.
    """

    def __init__(self, where: Path, shapes: Mapping[str, tuple[int, ...]]):
        self.where = absolute(where)
        metadata = self.where / "_METADATA"
        if not metadata.is_file():
            raise UserError(
                f"{where} is no Orbax checkpoint ({metadata.name} is missing); it is not whole, or"
                " no checkpoint of ours"
            )
        layout = read_json(metadata, "the checkpoint's layout", fix="use another checkpoint")
        if not {"use_ocdbt", "use_zarr3"} <= layout.keys():
            raise UserError(f"{metadata} is damaged; use another checkpoint")
        self._alias = library_path(self.where)  # lasts as long as this object
        self._folder = self._alias.__enter__()
        self._expected, self._arrays = recorded_checksums(self.where), {}
        for path, shape in shapes.items():
            kvstore = key_value_store(f"{self._folder}/{path}")
            if layout["use_ocdbt"]:
                base = key_value_store(self._folder)
                kvstore = {"driver": "ocdbt", "base": base, "path": f"{path}/"}
            spec = {
                "driver": "zarr3" if layout["use_zarr3"] else "zarr",
                "kvstore": kvstore,
                "fill_missing_data_reads": False,  # a lost chunk must not read as zeros
            }
            try:
                with reaching(self.where):
                    array = ts.open(spec, open=True, read=True).result()
            except ValueError as error:
                raise UserError(
                    f"{where} holds no readable {path} ({first_line(error)}); use another"
                    " checkpoint"
                ) from error
            if array.shape != shape:
                raise UserError(
                    f"{where}: {path} has the shape {array.shape}, and model.json makes it {shape};"
                    " they do not belong together"
                )
            self._arrays[path] = array
        self.dtypes = {
            path: np.dtype(array.dtype.numpy_dtype) for path, array in self._arrays.items()
        }

    def pieces(self, path: str) -> Iterator[tuple[int, np.ndarray]]:
        """All of one parameter, in order, as pieces along its first dimension with the index where
        each starts. UserError at the end where the checksum is not the recorded one.

        A piece is as many layers or rows as were saved in one chunk, and at least `PIECE_BYTES` of
        rows. The next one is being read while the caller works on this one.
        """
        array = self._arrays[path]
        chunk = array.chunk_layout.read_chunk.shape
        assert chunk is not None  # an open array knows its chunks
        assert chunk[0] is not None
        rows = chunk[0]
        if len(array.shape) == 2:
            row_bytes = array.shape[1] * self.dtypes[path].itemsize
            rows *= max(1, PIECE_BYTES // (rows * row_bytes))
        starts = range(0, array.shape[0], rows)
        reads = (array[start : min(start + rows, array.shape[0])].read() for start in starts)
        sums, ahead = Sums(path), next(reads)
        for start in starts:
            current, ahead = ahead, next(reads, ahead)
            pieces = [self._result(path, current)]
            del current
            sums.add(start, pieces[0])
            yield start, pieces.pop()  # nothing here holds it while the caller is elsewhere
        compare({path: sums.sums}, self._expected, self.where)

    def onto(self, path: str, target: jax.ShapeDtypeStruct) -> jax.Array:
        """One parameter in the shards and the type of `target`. UserError where its checksum is not
        the recorded one. Hosts read what their devices hold, each part once.

        The checksum is computed on the devices, from the stored type: for a moment they hold both.
        """
        array, sharding = self._arrays[path], target.sharding
        indices = sharding.addressable_devices_indices_map(target.shape)
        wanted = dict.fromkeys(index_bounds(index, target.shape) for index in indices.values())
        reads = {bounds: array[tuple(slice(*side) for side in bounds)].read() for bounds in wanted}
        parts = {bounds: self._result(path, read) for bounds, read in reads.items()}
        whole = jax.make_array_from_callback(
            target.shape, sharding, lambda index: parts[index_bounds(index, target.shape)]
        )
        if path in self._expected:
            compare(checksums(_nested(path, whole)), self._expected, self.where)
        return _cast(whole, target)

    def _result(self, path: str, read: ts.Future) -> np.ndarray:
        try:
            with reaching(self.where):
                return read.result()
        except ValueError as error:
            if is_passing(error):
                raise UserError(explain(error, self.where) or first_line(error)) from error
            raise UserError(
                f"{self.where}: {path} is damaged ({first_line(error)}); use another checkpoint"
            ) from error


def _cast(array: jax.Array, target: jax.ShapeDtypeStruct) -> jax.Array:
    if array.dtype == target.dtype:
        return array
    cast = jax.jit(lambda x: x.astype(target.dtype), out_shardings=target.sharding)
    return cast(array)


def index_bounds(
    index: tuple[slice, ...] | None, shape: tuple[int, ...]
) -> tuple[tuple[int, int], ...]:
    """Start and stop of each dimension of a shard in an array of this shape."""
    assert index is not None  # JAX's types allow None, and it gives none here
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def _nested(path: str, leaf) -> dict:
    for key in reversed(path.split(".")):
        leaf = {key: leaf}
    return leaf


class Sums:
    """Adds up the checksums of a parameter's pieces: one a layer for what lies in `layers`."""

    def __init__(self, path: str):
        self._stacked = path.startswith("layers.")
        self.sums: list[int] = []

    def add(self, start: int, piece: np.ndarray) -> None:
        """`start` is the index of the piece's first layer or row."""
        if self._stacked:
            self.sums += [checksum(layer) for layer in piece]
        else:
            part = checksum(piece, start * math.prod(piece.shape[1:]))
            self.sums = [(sum(self.sums) + part) % MODULUS]


def tree_shapes(tree: dict) -> dict[str, tuple[int, ...]]:
    """The shapes of a tree's arrays, or of those that it will have quantised, by path."""
    leaves = jax.tree_util.tree_leaves_with_path(
        tree, is_leaf=lambda node: isinstance(node, Quantized)
    )
    name = jax.tree_util.keystr
    return {name(path, simple=True, separator="."): tuple(leaf.shape) for path, leaf in leaves}


def restore(reader: ShardReader, target: dict) -> dict:
    """The weights that `target`, a tree of `ShapeDtypeStruct`s with shardings, names, in its types
    and shards, one parameter after the other. UserError as of the reader.
    """
    name = jax.tree_util.keystr
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: reader.onto(name(path, simple=True, separator="."), leaf), target
    )


def write_checksums(where: Path, sums: Mapping[str, list[int]]) -> None:
    """Writes the checksums of the weights in `where` beside them."""
    (where / CHECKSUMS).write_text(json.dumps(sums) + "\n")


def recorded_checksums(where: Path) -> dict[str, list[int]]:
    """The checksums kept with the weights in `where`, by path; none where none were kept, as by
    earlier versions. UserError where they cannot be read.
    """
    fix = "use another copy of it"
    path, about = where / CHECKSUMS, where.parent / ABOUT / "metadata"
    sums: object = {}
    if path.exists():
        sums = read_json(path, "the list of checksums", fix=fix)
    elif about.exists():
        path = about
        found = read_json(about, "the checkpoint's note", fix="use another checkpoint")
        kept = found.get("checksums", {})
        sums = kept.get("params", {}) if isinstance(kept, dict) else None
    if not isinstance(sums, dict) or not all(
        isinstance(each, list) and all(isinstance(number, int) for number in each)
        for each in sums.values()
    ):
        raise UserError(f"{path}: the list of checksums is damaged; {fix}")
    return sums


def computed_checksums(reader: "Reader") -> dict[str, list[int]]:
    """The checksums of all parameters, from reading all of them: a second or two for each GB."""

    def sums_of(path: str) -> list[int]:
        sums = Sums(path)
        for start, piece in reader.pieces(path):
            sums.add(start, piece)
        return sums.sums

    with ThreadPoolExecutor(WORKERS) as pool:
        return dict(zip(reader.dtypes, pool.map(sums_of, reader.dtypes), strict=True))
