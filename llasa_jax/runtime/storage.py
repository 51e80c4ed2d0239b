"""Every path of settings and commands: on this machine's disk, or in a bucket (gs:// or s3://;
hf:// to read only).

`as_path` makes a path of a text: pathlib's for this machine, etils' `epath.Path` for a bucket,
which has pathlib's methods. The helpers of `files` take both, and so does most code. What an object
store lacks is in `bucket_files` (folders that appear whole, files that grow) and `claims` (locks);
`copies` are for libraries that read only local files.
"""

import errno
import os
import posixpath
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, cast

from llasa_jax.errors import UserError, first_line

SCHEMES = ("gs://", "s3://", "hf://")
# Seconds. With the six tries of gcsfs and botocore, a store that does not answer is given up after
# about a minute where it refuses connections, and after two where it is silent.
CONNECT_TIMEOUT, READ_TIMEOUT = 5.0, 15.0
# What stores and their libraries say of a lack of rights, in errors of several kinds.
DENIED = re.compile(
    r"Forbidden|Access ?Denied|PERMISSION_DENIED|Anonymous caller|\b40[13]\b|credentials"
    r"|UNAUTHENTICATED",
    re.IGNORECASE,
)


# TensorStore's ValueErrors that say nothing about what lies in the bucket.
TENSORSTORE_FAULTS = re.compile(
    "PERMISSION_DENIED|RESOURCE_EXHAUSTED|UNAVAILABLE|DEADLINE_EXCEEDED|UNAUTHENTICATED"
    "|retry attempts failed|Bad Request"
)


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path lies in a bucket."""
    return os.fspath(path).startswith(SCHEMES)


def as_path(path: str | os.PathLike) -> Path:
    """The path that a text names: pathlib's, or for a bucket `epath.Path`, whose methods are the
    same (but `stat().length` for `st_size`, and no `glob("**")`). UserError where the library for
    such a bucket is not installed.
    """
    if not is_remote(path):
        return Path(path)
    file_system(path)
    from etils import epath  # only for those who use a bucket: `--help` answers at once

    return cast(Path, epath.Path(os.fspath(path)))


def absolute(path: str | os.PathLike) -> Path:
    """The path of a folder or file from the root of the disk or the bucket."""
    return as_path(path) if is_remote(path) else Path(os.path.abspath(path))


def bucket_of(path: str | os.PathLike) -> str:
    """The bucket with its scheme, such as gs://bucket."""
    return "/".join(os.fspath(path).split("/")[:3])


def file_system(path: str | os.PathLike) -> Any:
    """fsspec's file system of a path in a bucket, the same object that epath uses. It caches no
    listings: other machines write there too. UserError where its library is not installed.
    """
    return _file_system(os.fspath(path).partition("://")[0])


@cache
def _file_system(scheme: str) -> Any:
    import logging

    import fsspec

    library = {"gs": "gcsfs", "s3": "s3fs", "hf": "huggingface_hub"}[scheme]
    for name in (library, "google.auth"):  # their errors become sentences here
        logging.getLogger(name).setLevel(logging.CRITICAL)
    options: dict[str, Any] = {"use_listings_cache": False}
    if scheme == "gs":
        options |= {"requests_timeout": _timeout(), "consistency": "md5"}
    elif scheme == "s3":
        options["config_kwargs"] = {
            "connect_timeout": CONNECT_TIMEOUT,
            "read_timeout": READ_TIMEOUT,
            "retries": {"max_attempts": 6, "mode": "standard"},
        }
    # As fsspec's defaults, so that epath's own call makes the same object.
    fsspec.config.conf.setdefault(scheme, {}).update(options)
    try:
        return (
            fsspec.filesystem("gcs", finalize_on_close=True)
            if scheme == "gs"
            else fsspec.filesystem(scheme)
        )
    except ImportError as error:
        extra = {"gs": "gcs"}.get(scheme, scheme)
        raise UserError(
            f"{scheme}:// paths need the package {library}; run `pip install 'llasa-jax[{extra}]'`"
        ) from error
    except Exception as error:
        raise UserError(
            f"{scheme}:// paths cannot be used ({first_line(error)}); check the credentials of this"
            " machine"
        ) from error


def _timeout() -> Any:
    try:
        import aiohttp
    except ImportError:  # without gcsfs; told by the caller
        return None
    return aiohttp.ClientTimeout(sock_connect=CONNECT_TIMEOUT, sock_read=READ_TIMEOUT)


# Errors


@contextmanager
def reaching(path: str | os.PathLike) -> Iterator[None]:
    """Turns what the libraries of object stores raise inside into a UserError. Nothing changes for
    paths of this machine.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # `files.explain` has sentences for files of this machine, readers for damaged arrays.
        if (
            not is_remote(path)
            or (isinstance(error, OSError) and error.errno in LOCAL_FAULTS)
            or (isinstance(error, ValueError) and not TENSORSTORE_FAULTS.search(str(error)))
        ):
            raise
        raise UserError(sentence(error, path)) from error


LOCAL_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


def sentence(error: BaseException, path: str | os.PathLike) -> str:
    """What an error of an object store means, with the fix."""
    bucket, where = bucket_of(path), os.fspath(path)
    if DENIED.search(f"{type(error).__name__} {error}"):
        return (
            f"{bucket}: access denied ({first_line(error)}); log in (`gcloud auth"
            " application-default login`, or AWS's credentials), or give this machine's account"
            " the right to read, and for what is written to create and delete, objects there"
        )
    if isinstance(error, FileNotFoundError):
        return f"{where} does not exist, or there is no bucket {bucket}; check the path"
    return (
        f"{bucket} cannot be reached ({first_line(error)}); check the bucket's name, the network"
        " and the credentials, and give the same command again"
    )


def is_store_error(error: BaseException) -> bool:
    """Whether an error is of a library that talks to object stores."""
    libraries = ("gcsfs", "s3fs", "aiohttp", "botocore", "aiobotocore", "google", "fsspec")
    return type(error).__module__.partition(".")[0] in (*libraries, "requests")


def check_reachable(path: str | os.PathLike, what: str) -> None:
    """UserError where a bucket to read from does not answer, or `path` is not there. `what` says
    what the path is, in the sentence.
    """
    if not is_remote(path):
        return
    system = file_system(path)
    with reaching(path):
        if system.exists(os.fspath(path)):
            return
        there = system.exists(bucket_of(path))
    raise UserError(
        f"{path}: {what} is not there"
        + (
            "; check the path"
            if there
            else f", for there is no bucket {bucket_of(path)} for this"
            " account; check its name and its project"
        )
    )


def check_writable(folder: str | os.PathLike) -> None:
    """UserError where nothing can be written to a bucket's folder."""
    if not is_remote(folder):
        return
    if os.fspath(folder).startswith("hf://"):
        raise UserError(f"{folder}: hf:// can only be read; write to a folder, gs:// or s3://")
    system, probe = file_system(folder), f"{folder}/.probe-{uuid.uuid4().hex}"
    with reaching(folder):
        system.pipe_file(probe, b"llasa-jax may write here")
        system.rm_file(probe)


# Reading and writing


class Entry(NamedTuple):
    """A file in a bucket: its size in bytes, what tells one content from another (generation or
    ETag), its MD5 as hex digits where the store has it, and its time of change, ns.
    """

    size: int
    version: str
    md5: str
    changed: int


def entries(folder: str | os.PathLike, deep: bool = True) -> dict[str, Entry]:
    """The files in a bucket's folder (with `deep` in those below it too) by their paths relative to
    it; for a file, itself by its name. Empty where there is none.
    """
    system, root = file_system(folder), os.fspath(folder).rstrip("/")
    with reaching(folder):
        try:
            found = (
                system.find(root, detail=True)
                if deep
                else {each["name"]: each for each in system.ls(root, detail=True)}
            )
        except FileNotFoundError:
            return {}
    inside = root.partition("://")[2]
    named = {}
    for name, info in found.items():
        name = name.partition("://")[2] if "://" in name else name
        if info.get("type") == "file" and not name.endswith("/"):
            relative = posixpath.relpath(name, inside)
            named[posixpath.basename(name) if relative == "." else relative] = _entry(info)
    return named


def _entry(info: dict) -> Entry:
    import base64

    tag = str(info.get("ETag") or info.get("etag") or info.get("blob_id") or "").strip('"')
    md5 = ""
    if info.get("md5Hash"):
        md5 = base64.b64decode(info["md5Hash"]).hex()
    elif "ETag" in info and re.fullmatch(r"[0-9a-f]{32}", tag):
        md5 = tag  # S3's, of objects that were put in one piece
    changed = info.get("mtime") or info.get("updated") or info.get("LastModified") or 0
    if isinstance(changed, str):
        from datetime import datetime

        changed = datetime.fromisoformat(changed.replace("Z", "+00:00"))
    seconds = changed.timestamp() if hasattr(changed, "timestamp") else float(changed)
    version = str(info.get("generation") or tag)
    return Entry(int(info.get("size") or 0), version, md5, int(seconds * 1e6) * 1000)


@cache
def _neighbours(folder: str) -> dict[str, Entry]:
    return entries(folder, deep=False)


def known_entry(path: str | os.PathLike) -> Entry | None:
    """A file's entry from a listing of its folder, made once in this process: for many files that
    do not change. None where it is not there.
    """
    folder, _, name = os.fspath(path).rpartition("/")
    return _neighbours(folder).get(name)


def read_bytes(path: str | os.PathLike, start: int | None = None, stop: int | None = None) -> bytes:
    """The bytes `start` to `stop` of a file in a bucket, by default all. UserError where it cannot
    be read, FileNotFoundError where it is not there.
    """
    try:
        with reaching(path):
            return file_system(path).cat_file(os.fspath(path), start=start, end=stop)
    except UserError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            missing = os.strerror(errno.ENOENT)
            raise FileNotFoundError(errno.ENOENT, missing, os.fspath(path)) from None
        raise


def size(path: str | os.PathLike) -> int:
    """The size of a file in a bucket, bytes. UserError where it is not there."""
    with reaching(path):
        return int(file_system(path).size(os.fspath(path)))


def write_bytes(path: str | os.PathLike, content: bytes) -> None:
    """Writes a file in a bucket, whole or not at all. UserError where that cannot be done."""
    with reaching(path):
        file_system(path).pipe_file(os.fspath(path), content)


def create(path: str | os.PathLike, content: bytes) -> bool:
    """Writes a file in a bucket if there is none of that name; False if there is. The store decides
    (`x-goog-if-generation-match: 0`, `If-None-Match: *`), so of several writers one succeeds.
    """
    with reaching(path):
        try:
            file_system(path).pipe_file(os.fspath(path), content, mode="create")
        except FileExistsError:
            return False
        except Exception as error:
            # A try whose answer was lost has made it, and the next one finds its own.
            if re.search(r"PreconditionFailed|\b412\b|ConditionalRequestConflict", str(error)):
                return read_bytes(path) == content
            raise
    return True


def remove(path: str | os.PathLike) -> None:
    """Removes a file, or a folder with all that is in it, if it is there."""
    system = file_system(path)
    with reaching(path), suppress(FileNotFoundError):
        system.rm(os.fspath(path), recursive=True)


def move(source: str | os.PathLike, destination: str | os.PathLike) -> None:
    """Moves a bucket's folder within the bucket: copies all files, then removes the old ones."""
    system = file_system(source)
    with reaching(source):
        for name in entries(source):
            system.cp_file(f"{source}/{name}", f"{destination}/{name}")
    remove(source)


def key_value_store(path: str | os.PathLike) -> dict[str, Any]:
    """TensorStore's spec of a folder, on this machine or in a bucket."""
    path = os.fspath(path).rstrip("/") + "/"
    if not is_remote(path):
        return {"driver": "file", "path": path}
    scheme, _, rest = path.partition("://")
    bucket, _, inside = rest.partition("/")
    if scheme == "hf":
        raise UserError(f"{path}: models of our own format are read from a folder, gs:// or s3://")
    if scheme == "gs":
        return {
            "driver": "gcs",
            "bucket": bucket,
            "path": inside,
            "context": {"gcs_request_retries": {"max_retries": 6, "max_delay": "8s"}},
        }
    spec: dict[str, Any] = {"driver": "s3", "bucket": bucket, "path": inside}
    if os.environ.get("AWS_ACCESS_KEY_ID"):
        # By itself it looks for files first, and complains on stderr of each that is not there.
        spec["aws_credentials"] = {"type": "environment"}
    if endpoint := os.environ.get("AWS_ENDPOINT_URL"):
        spec |= {"endpoint": endpoint, "aws_region": os.environ.get("AWS_REGION", "us-east-1")}
    return spec
