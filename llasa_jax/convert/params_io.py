"""Our weights on disk, piece by piece: what Orbax reads as a checkpoint, written and read without a
whole array in memory.

Written is plain zarr v2 without compression, a folder for each parameter and a file for each chunk,
beside Orbax's two metadata files (Orbax's format with `use_ocdbt=False`). A chunk is one layer's,
or some rows of a table's, and an eighth of D, so that a sharded restore reads little beyond what
each device holds. Read is any Orbax checkpoint of ours, a training run's as well.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np

from llasa_jax.convert.direct_file import DirectFile
from llasa_jax.convert.names import our_axes, our_shapes
from llasa_jax.errors import UserError, first_line
from llasa_jax.model.config import ModelConfig
from llasa_jax.runtime.files import read_json

D_CHUNKS = 8  # the devices of one host: the usual size of the `fsdp` axis, which D is split over
PIECE_BYTES = 16 << 20  # of a table, read or written at a time
ZARR_DTYPES = {
    np.dtype(np.float32): "<f4",
    np.dtype(np.float16): "<f2",
    np.dtype(ml_dtypes.bfloat16): "bfloat16",
}


class ParamsWriter:
    """Writes the parameters of `config` into the new folder `where`, each in its dtype of `dtypes`
    (by path).
    """

    def __init__(self, where: Path, config: ModelConfig, dtypes: dict[str, np.dtype]):
        self._where, self._axes, self._shapes, self._dtypes = (
            where,
            our_axes(config),
            our_shapes(config),
            dtypes,
        )
        for path, shape in self._shapes.items():
            (where / path).mkdir(parents=True)
            array = {
                "shape": shape,
                "chunks": self._chunks(path),
                "dtype": ZARR_DTYPES[dtypes[path]],
                "compressor": None,
            }
            array |= {
                "fill_value": None,
                "filters": None,
                "order": "C",
                "dimension_separator": ".",
                "zarr_format": 2,
            }
            (where / path / ".zarray").write_text(json.dumps(array))
        handler = (
            "orbax.checkpoint._src.handlers.standard_checkpoint_handler.StandardCheckpointHandler"
        )
        (where / "_CHECKPOINT_METADATA").write_text(
            json.dumps({"item_handlers": handler, "metrics": {}, "custom_metadata": {}})
        )
        tree = {
            "tree_metadata": dict(map(self._metadata, self._shapes)),
            "use_ocdbt": False,
            "use_zarr3": False,
        }
        (where / "_METADATA").write_text(
            json.dumps(
                tree | {"store_array_data_equal_to_fill_value": True, "custom_metadata": None}
            )
        )

    def _metadata(self, path: str) -> tuple[str, dict]:
        keys = path.split(".")
        value = {
            "value_type": "jax.Array",
            "skip_deserialize": False,
            "write_shape": self._shapes[path],
        }
        return str(tuple(keys)), {
            "key_metadata": [{"key": key, "key_type": 2} for key in keys],
            "value_metadata": value,
        }

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
        axes = self._axes[path]
        if axes[0] == "L":
            piece = piece[None]
        chunks = self._chunks(path)
        d = axes.index("D")
        for part, slab in enumerate(np.split(piece, piece.shape[d] // chunks[d], axis=d)):
            key = [0] * len(axes)
            key[0] = index or 0
            key[d] += part
            with DirectFile(self._where / path / ".".join(map(str, key)), slab.nbytes) as file:
                file.write(0, slab)


class ParamsReader:
    """The parameters in an Orbax checkpoint of `config`, wherever and however sharded they were
    saved.

    `dtypes` gives the stored type by path, `config` is what was given. UserError where a parameter
    is missing, misshapen or damaged.
    """

    def __init__(self, where: Path, config: ModelConfig):
        import tensorstore as ts

        self.where, self.config = Path(where).absolute(), config
        metadata = self.where / "_METADATA"
        if not metadata.is_file():
            raise UserError(
                f"{where} is no Orbax checkpoint ({metadata.name} is missing); it is not whole, or"
                " no checkpoint of ours"
            )
        layout = read_json(metadata, "the checkpoint's layout", fix="use another checkpoint")
        if not {"use_ocdbt", "use_zarr3"} <= layout.keys():
            raise UserError(f"{metadata} is damaged; use another checkpoint")
        self._arrays = {}
        for path, shape in our_shapes(config).items():
            kvstore = {"driver": "file", "path": f"{self.where}/{path}/"}
            if layout["use_ocdbt"]:
                kvstore = {"driver": "ocdbt", "base": f"file://{self.where}/", "path": f"{path}/"}
            spec = {
                "driver": "zarr3" if layout["use_zarr3"] else "zarr",
                "kvstore": kvstore,
                "fill_missing_data_reads": False,
            }
            try:
                array = ts.open(spec, open=True, read=True).result()
            except ValueError as error:
                raise UserError(
                    f"{where} holds no readable {path} ({first_line(error)}); use another"
                    " checkpoint"
                ) from error
            if array.shape != shape:
                raise UserError(
                    f"{where}: {path} has the shape {array.shape}, and model.json makes it {shape};"
                    " they are no pair"
                )
            self._arrays[path] = array
        self.dtypes = {
            path: np.dtype(array.dtype.numpy_dtype) for path, array in self._arrays.items()
        }

    def pieces(self, path: str) -> Iterator[tuple[int, np.ndarray]]:
        """All of one parameter, in order, as pieces along its first dimension with the place where
        each starts.

        A piece is as many layers or rows as were saved in one chunk, and at least `PIECE_BYTES` of
        rows. The next one is being read while the caller works on this one.
        """
        array = self._arrays[path]
        rows = array.chunk_layout.read_chunk.shape[0]
        if len(array.shape) == 2:
            row_bytes = array.shape[1] * self.dtypes[path].itemsize
            rows *= max(1, PIECE_BYTES // (rows * row_bytes))
        starts = range(0, array.shape[0], rows)
        reads = (array[start : min(start + rows, array.shape[0])].read() for start in starts)
        ahead = next(reads)
        for start in starts:
            current, ahead = ahead, next(reads, None)
            try:
                yield start, current.result()
            except ValueError as error:
                raise UserError(
                    f"{self.where}: {path} is damaged ({first_line(error)}); use another checkpoint"
                ) from error
