"""Safetensors without a copy of the model in memory: tensors read and written by pieces, at their
place in the file.

The format (huggingface/safetensors, README): the header's length as 8 bytes little-endian, the
header as JSON, the tensors' bytes. The library reads and checks headers. Bytes are read here: its
memory maps count as this process's memory, and its `pread` backend (0.8.0) reads slices of a matrix
at 0.03 GB/s where plain reads do 2 GB/s.
"""

import contextlib
import json
import math
import re
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from llasa_jax.convert.direct_file import ALIGNMENT, DirectFile
from llasa_jax.errors import UserError, first_line, listed
from llasa_jax.runtime import storage
from llasa_jax.runtime.files import read_json
from llasa_jax.runtime.storage import as_path, is_remote

DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
CALL_BYTES = 1 << 20
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Tensor(NamedTuple):
    """One tensor's bytes: `offset` from the file's start."""

    file: Path
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsFolder:
    """The tensors of an HF checkpoint, by name in the order of the files. Nothing is read but
    headers until `read`.

    `single` is the name of the file where there is only one. Raises UserError for pickles, and for
    files that are absent, truncated or damaged or hold what no Llama has.
    """

    def __init__(self, folder: Path, single: str = SINGLE):
        self.folder, self._single = as_path(folder), single
        self.tensors: dict[str, Tensor] = {}
        weight_map = self._weight_map()
        for file in sorted(set(weight_map.values())) if weight_map else [single]:
            for name, tensor in _read_header(self.folder / file).items():
                if name in self.tensors:
                    both = f"{self.tensors[name].file.name} and {file}"
                    raise UserError(
                        f"{self.folder}: the tensor {name[:200]} is in both {both}; remove the file"
                        " that the index does not mean"
                    )
                self.tensors[name] = tensor
        lost = [
            name
            for name, file in weight_map.items()
            if name not in self.tensors or self.tensors[name].file.name != file
        ]
        if lost:
            raise UserError(
                f"{self.folder / INDEX} names {listed(lost[:1])} in {weight_map[lost[0]]}, which"
                " lacks it;"
                " download the checkpoint again"
            )

    def _weight_map(self) -> dict[str, str]:
        index = self.folder / INDEX
        if not index.is_file():
            if not (self.folder / self._single).is_file():
                self._refuse()
            return {}
        weight_map = read_json(index, "the checkpoint's index", fix="download it again").get(
            "weight_map"
        )
        if not isinstance(weight_map, dict) or not all(map(_is_file_name, weight_map.values())):
            raise UserError(f"{index} is damaged; download it again")
        absent = sorted(
            {file for file in weight_map.values() if not (self.folder / file).is_file()}
        )
        if absent or not weight_map:
            raise UserError(
                f"{index} names {listed(absent) or 'no file'}, and that is not there; download"
                " the checkpoint again"
            )
        return weight_map

    def _refuse(self) -> None:
        pickles = sorted(
            p.name for p in self.folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt")
        )
        if pickles:
            raise UserError(
                f"{self.folder} holds only pickles ({pickles[0]}), which can run any code as they"
                f" are read; convert them first: `python convert/pickle_to_safetensors.py"
                f" {self.folder} NEW_FOLDER`, or save_pretrained of transformers"
            )
        raise UserError(
            f"{self.folder} holds no {SINGLE} and no {INDEX}; give the folder of a complete HF"
            " checkpoint in safetensors"
        )

    def read(
        self, name: str, start: int = 0, stop: int | None = None, memory: np.ndarray | None = None
    ) -> np.ndarray:
        """Rows `start` to `stop` of a tensor's first dimension (all by default), as an array in the
        file's dtype.

        The array is a new one, or lies in `memory` (bytes, large enough) where that is given.
        """
        tensor = self.tensors[name]
        rows = range(tensor.shape[0])[start:stop]
        row_bytes = math.prod(tensor.shape[1:]) * tensor.dtype.itemsize
        array = (np.empty(len(rows) * row_bytes, np.uint8) if memory is None else memory)[
            : len(rows) * row_bytes
        ]
        buffer, first = array.data, tensor.offset + rows.start * row_bytes
        if is_remote(tensor.file):
            content = storage.read_bytes(tensor.file, first, first + len(buffer))
            if len(content) < len(buffer):
                raise UserError(f"{tensor.file} ends within {name}; copy it again")
            buffer[:] = content
            return array.view(tensor.dtype).reshape(len(rows), *tensor.shape[1:])
        with tensor.file.open("rb", buffering=0) as file:
            file.seek(first)
            while buffer:
                got = file.readinto(buffer[:CALL_BYTES])
                if not got:
                    raise UserError(f"{tensor.file} ends within {name}; download it again")
                buffer = buffer[got:]
        return array.view(tensor.dtype).reshape(len(rows), *tensor.shape[1:])


def _is_file_name(name: object) -> bool:
    """Whether an index may name this file: one beside it, which a file system can hold."""
    return isinstance(name, str) and bool(re.fullmatch(r"[^/\\\0]{1,200}", name))


def _read_header(path: Path) -> dict[str, Tensor]:
    remote = is_remote(path)
    size = storage.size(path) if remote else path.stat().st_size
    if remote:
        length = int.from_bytes(storage.read_bytes(path, 0, 8), "little")
    else:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > size - 8:
        raise UserError(f"{path} is truncated or not a safetensors file; download it again")
    try:
        # The library checks the header: types, sizes, and that no two tensors share bytes.
        with (
            _header_alone(path, 8 + length, size) as local,
            safe_open(local, framework="np", backend="pread") as header,
        ):
            slices = [(name, header.get_slice(name)) for name in header.offset_keys()]
            entries = [(name, each.get_dtype(), tuple(each.get_shape())) for name, each in slices]
    except SafetensorError as error:
        if "not fully covered" in str(error):
            raise UserError(
                f"{path} is truncated, or holds bytes of no tensor; download it again"
            ) from None
        raise UserError(
            f"{path} has a damaged header ({first_line(error)}); download it again"
        ) from None
    tensors, offset = {}, 8 + length
    for name, code, shape in entries:
        if code not in DTYPES:
            raise UserError(
                f"{path}: the tensor {name[:200]} is of type {code}, and only"
                f" {', '.join(DTYPES)} are read; use one that is not quantised"
            )
        tensors[name] = Tensor(path, offset, DTYPES[code], shape)
        offset += tensors[name].bytes  # tensors lie side by side: the library has checked it
    return tensors


@contextlib.contextmanager
def _header_alone(path: Path, length: int, size: int) -> Iterator[Path]:
    """A file of this machine with the same header; for one in a bucket, a sparse file of its size
    that holds nothing else.
    """
    if not is_remote(path):
        yield path
        return
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
        file.write(storage.read_bytes(path, 0, length))
        file.truncate(size)
        file.flush()
        yield Path(file.name)


def named_dtype(name: str) -> np.dtype:
    """The type called "float32", "float16" or "bfloat16". UserError for any other."""
    for dtype in CODES:
        if dtype.name == name:
            return dtype
    raise UserError(
        f"weights cannot be kept as {name!r}; choose one of"
        f" {', '.join(dtype.name for dtype in CODES)}"
    )


def parse_size(text: str | int) -> int:
    """Bytes of "5GB", "500MB", "2GiB" or a plain number. UserError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", str(text), re.IGNORECASE)
    size = (
        int(
            float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " ")
        )
        if match
        else 0
    )
    if size <= 0:
        raise UserError(f"{text!r} is no size of a file; write it like 5GB or 500MB")
    return size


class SafetensorsWriter:
    """Writes tensors of known shapes into `folder`, piece by piece in any order, in files of at
    most `max_shard_size` bytes.

    File names and index are HF's, `single` is that of one file alone. A tensor larger than the
    limit gets a file of its own. Room is made for all files at once, unless `finished` takes each
    when it is whole: then for one when its first bytes come. A context manager, which closes the
    files.
    """

    def __init__(
        self,
        folder: Path,
        shapes: dict[str, tuple[int, ...]],
        dtypes: dict[str, np.dtype],
        max_shard_size: int,
        single: str = SINGLE,
        finished: Callable[[Path], None] | None = None,
    ):
        self._finished, self._lock = finished, threading.Lock()
        sizes = {name: math.prod(shape) * dtypes[name].itemsize for name, shape in shapes.items()}
        shards: list[list[str]] = [[]]
        room = max_shard_size
        for name, size in sizes.items():
            if size > room and shards[-1]:
                shards.append([])
                room = max_shard_size
            shards[-1].append(name)
            room -= size
        self._tensors: dict[str, Tensor] = {}
        self._files: dict[Path, DirectFile] = {}
        self._headers: dict[Path, bytes] = {}
        self._left: dict[Path, int] = {}  # bytes of tensors that are not written yet
        for number, members in enumerate(shards, 1):
            header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
            at = 0
            for name in members:
                header[name] = {
                    "dtype": CODES[dtypes[name]],
                    "shape": list(shapes[name]),
                    "data_offsets": [at, at + sizes[name]],
                }
                at += sizes[name]
            text = json.dumps(header, separators=(",", ":")).encode()
            text += b" " * (-(8 + len(text)) % ALIGNMENT)  # so that the data starts aligned
            path = Path(folder) / (
                single if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
            )
            self._headers[path] = len(text).to_bytes(8, "little") + text
            self._left[path] = at
            if finished is None:
                self._open(path)
            for name in members:
                self._tensors[name] = Tensor(
                    path,
                    8 + len(text) + header[name]["data_offsets"][0],
                    dtypes[name],
                    shapes[name],
                )
        if len(shards) > 1:
            index = {
                "metadata": {
                    "total_parameters": sum(map(math.prod, shapes.values())),
                    "total_size": sum(sizes.values()),
                },
                "weight_map": {
                    name: self._tensors[name].file.name for name in sorted(self._tensors)
                },
            }
            (Path(folder) / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def write(self, name: str, rows: np.ndarray, start: int = 0) -> None:
        """Writes `rows`, of the tensor's own dtype, from row `start` on, each row once; threads may
        do so at once. OSError where the disk is full.
        """
        tensor = self._tensors[name]
        row_bytes = math.prod(tensor.shape[1:]) * tensor.dtype.itemsize
        if (
            rows.dtype != tensor.dtype
            or start < 0
            or start * row_bytes + rows.nbytes > tensor.bytes
        ):
            # Beyond its end lies the next tensor.
            raise ValueError(f"{rows.shape} of {rows.dtype} at row {start} do not fit {name}")
        with self._lock:
            file = self._files.get(tensor.file) or self._open(tensor.file)
        file.write(tensor.offset + start * row_bytes, rows)
        with self._lock:
            self._left[tensor.file] -= rows.nbytes
            if self._finished is None or self._left[tensor.file]:
                return
            self._files.pop(tensor.file).close()
        self._finished(tensor.file)

    def _open(self, path: Path) -> DirectFile:
        file = DirectFile(path, len(self._headers[path]) + self._left[path])
        self._files[path] = file
        file.write(0, self._headers[path])
        return file

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def __exit__(self, *error) -> None:
        for file in self._files.values():
            file.close()


def fault(array: np.ndarray) -> str:
    """ "NaN" or "infinity" where a float array of 2 or 4 bytes an element holds one, else "". Two
    passes over its bits, no copy.

    As integers, NaNs lie beyond infinity's bits: above +inf as signed numbers, above -inf as
    unsigned ones.
    """
    found = set()
    for kind, infinity in (("i", np.inf), ("u", -np.inf)):
        bits = f"{kind}{array.dtype.itemsize}"
        top, limit = array.view(bits).max(initial=0), np.array(infinity, array.dtype).view(bits)
        found.add("NaN" if top > limit else "infinity" if top == limit else "")
    return "NaN" if "NaN" in found else max(found)


def cast(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The array in another float type; itself where it has it. What is too large becomes infinity,
    silently: see `fault`.
    """
    with np.errstate(over="ignore"):
        return array.astype(dtype, copy=False)
