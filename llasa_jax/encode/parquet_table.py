"""Hugging Face datasets in Parquet files, read where they lie: on the disk, on the hub, or in a
bucket. `datasets` would write all of them to its cache once more, as Arrow, to have random access.

Texts are kept in memory. Audio and codes are read forward, some rows at a time, so rows that follow
each other cost one pass over a file; a step back begins its row group again.
"""

import bisect
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from llasa_jax.encode.hf_table import HFTable, split_name
from llasa_jax.errors import UserError, first_line
from llasa_jax.runtime import storage

ROWS = 16  # of audio or codes, in memory at a time
BLOCK = 4 << 20  # bytes that are asked of a store at once


def open_parquet(source: str | os.PathLike, config: str | None) -> "dict[str, ParquetTable] | None":
    """The splits of a folder (of this machine, or gs:// or s3://) or a hub id that `datasets` knows
    for one of Parquet files; None for others, or where `datasets` is not installed. UserError for
    damaged files, and for a bucket's folder without such files.
    """
    try:
        import datasets
        from datasets.packaged_modules.parquet.parquet import Parquet
    except ImportError:
        return None
    if storage.is_remote(source):
        files_of = _files_in_bucket(os.fspath(source))
    else:
        try:
            builder = datasets.load_dataset_builder(os.fspath(source), config)
        except (OSError, ValueError):
            return None  # `load_splits` says why
        if not isinstance(builder, Parquet) or not builder.config.data_files:
            return None
        files_of = builder.config.data_files
    return {
        split_name(str(split)): ParquetTable([str(file) for file in files], str(source))
        for split, files in files_of.items()
    }


def _files_in_bucket(folder: str) -> dict[str, list[str]]:
    """The Parquet files of each split, told from their names as `datasets` does it."""
    from datasets.data_files import DataFilesDict, EmptyDatasetError, get_data_patterns

    try:
        with storage.reaching(folder):
            found = DataFilesDict.from_patterns(get_data_patterns(folder), base_path=folder)
    except (EmptyDatasetError, FileNotFoundError):
        found = {}
    files_of = {
        split: [file for file in files if file.endswith(".parquet")]
        for split, files in found.items()
    }
    files_of = {split: files for split, files in files_of.items() if files}
    if not files_of:
        raise UserError(
            f"{folder}: no Parquet files are there, and of buckets no other datasets of Hugging"
            " Face's are read; check the folder, or copy it to this machine."
        )
    return files_of


class ParquetTable(HFTable):
    """A split in Parquet files. Paths in it may be relative to its `folder`. UserError where a file
    is damaged, or has other columns than the first.
    """

    def __init__(self, files: Sequence[str], folder: str):
        import datasets

        schemas, counts = zip(*map(_described, files), strict=True)
        for file, schema in zip(files, schemas, strict=True):
            if not schema.equals(schemas[0]):
                raise UserError(
                    f"{file}: has other columns than {files[0]}; put files of one kind in a split."
                )
        features = datasets.Features.from_arrow_schema(schemas[0])
        super().__init__(datasets.Dataset.from_dict({n: [] for n in features}, features), folder)
        self.files = list(files)
        self._starts = np.concatenate([[0], np.cumsum(counts)]).tolist()
        self._large = {field.name for field in schemas[0] if _is_large(field.type)}

    def __len__(self) -> int:
        return self._starts[-1]

    def __getstate__(self) -> dict:
        """Without what is read: reading processes need no texts."""
        return self.__dict__ | {"_views": {}}

    def _columns(self, *names: str):
        if names not in self._views:
            columns = list(dict.fromkeys(names))
            if self._large.isdisjoint(columns):
                import pyarrow as pa
                import pyarrow.parquet as pq

                parts = [pq.read_table(opened(file), columns=columns) for file in self.files]
                self._views[names] = _Texts(pa.concat_tables(parts))
            else:
                self._views[names] = _Forward(self.files, self._starts, columns)
        return self._views[names]


class _Texts:
    def __init__(self, table):
        self._columns = {name: table[name] for name in table.column_names}

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: column[index].as_py() for name, column in self._columns.items()}


class _Forward:
    """Rows by their numbers, for a reader that goes forward."""

    def __init__(self, files: Sequence[str], starts: list[int], columns: list[str]):
        self._files, self._starts, self._names = files, starts, columns
        self._file: Any = None
        self._number = -1  # of the file that is open
        self._batches: Iterator = iter(())
        self._batch: Any = None  # rows from `_first` on
        self._first = self._stop = self._end = 0  # `_end` is that of the row group

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not self._first <= index < self._end:
            self._begin(index)
        while index >= self._stop:
            self._batch = next(self._batches)
            self._first, self._stop = self._stop, self._stop + self._batch.num_rows
        return {name: self._batch[name][index - self._first].as_py() for name in self._names}

    def _begin(self, index: int) -> None:
        """Opens the row group that has a row."""
        import pyarrow.parquet as pq

        number = bisect.bisect_right(self._starts, index) - 1
        if number != self._number:
            # Not all of a row group at once: it may be as large as the file.
            if self._file is not None:
                self._file.close(force=True)
            file = opened(self._files[number])
            self._file = pq.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20)
            self._number = number
        start, group = self._starts[number], 0
        while index >= (end := start + self._file.metadata.row_group(group).num_rows):
            start, group = end, group + 1
        self._batches = self._file.iter_batches(ROWS, [group], self._names, use_threads=False)
        self._first = self._stop = start
        self._end = end


def opened(file: str) -> Any:
    """What pyarrow reads a file by: the path, or one that asks its store for what is read."""
    if not storage.is_remote(file):
        return file
    return storage.file_system(file).open(file, "rb", block_size=BLOCK, cache_type="readahead")


def _described(file: str):
    """The columns of a file, and how many rows it has."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with storage.reaching(file):
            metadata = pq.read_metadata(opened(file))
        return metadata.schema.to_arrow_schema(), metadata.num_rows
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{file}: cannot be read ({first_line(error)}); copy it again.") from error


def _is_large(kind) -> bool:
    """Whether values of this Arrow type may be audio or codes."""
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return any(_is_large(field.type) for field in kind)
    listed = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return (
        pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or any(f(kind) for f in listed)
    )
