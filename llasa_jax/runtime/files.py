"""Files of this machine or a bucket, read with one guard, and the errors of the system in sentences
that say how to fix them.
"""

import errno
import hashlib
import json
import os
import re
import stat
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any, NoReturn

from llasa_jax.errors import UserError, first_line, printable
from llasa_jax.runtime import storage

MiB = 1 << 20
MOST_NESTED = 100
DOWNLOAD_AGAIN = "copy it again from its source"
FULL = errno.ENOSPC, errno.EDQUOT
# What PyYAML raises for a scalar that does not fit its tag, such as `!!bool 5` or `!!int ''`.
PYYAML_ERRORS = ValueError, ArithmeticError, LookupError, TypeError, AttributeError
# What OSErrors mean to a user: `{path}` is the file that the error names.
EXPLANATIONS = {
    errno.ENOSPC: "the disk of {path} is full; make room and give the same command again",
    errno.EDQUOT: "the disk quota of {path} is used up; make room and give the same command again",
    errno.EROFS: "{path} is on a read-only file system; choose a folder that you may write to",
    errno.EACCES: "{path}: permission denied; ask its owner for access, or choose another path",
    errno.EPERM: "{path}: operation not permitted; ask its owner for access, or choose another"
    " path",
    errno.EMFILE: "{path}: too many open files; raise the limit (`ulimit -n 4096`) and try again",
    errno.ENFILE: "{path}: the system has too many open files; close other programs and try again",
    errno.ENAMETOOLONG: "{path}: the name is too long; choose a shorter one",
    errno.ENOENT: "{path} does not exist; check the path",
    errno.EEXIST: "{path} exists already; remove it, or choose another path",
    errno.ENOTEMPTY: "{path} is not empty; remove what it holds, or choose another path",
    errno.EISDIR: "{path} is a folder, not a file; name a file",
    errno.ENOTDIR: "{path}: a part of this path is a file, not a folder; check the path",
    errno.ELOOP: "{path}: its symbolic links lead in a circle; remove one of them",
    errno.EIO: "{path}: input/output error; check the disk or network, and give the same command"
    " again",
    errno.ESTALE: "{path}: the network file system has lost it; give the same command again",
    errno.ETIMEDOUT: "{path}: the network file system does not answer; give the same command again",
    errno.EFBIG: "{path}: larger than the file-size limit; raise the limit (`ulimit -f unlimited`)",
    errno.ENOMEM: "{path}: not enough memory; close other programs, or use a larger machine",
    errno.EBUSY: "{path} is in use by another program; close it and try again",
    errno.EXDEV: "{path}: cannot be moved to another disk; choose a path on the same disk",
}

# TensorStore's words for an error of the system: the file and the number.
_TENSORSTORE = re.compile(r"""(?s)"(/[^"]*)".*\[os_error_code='(\d+)'""")


def explain(error: BaseException, path: str | os.PathLike | None = None) -> str | None:
    """A sentence for an error of the system, with the fix; None for an error that is not one.

    `path` is named where the error names no file. TensorStore and SQLite report such errors only
    in their text, and others raise an OSError as the cause of an error of their own.
    """
    full, stored = is_full(error), _TENSORSTORE.search(str(error))
    if not full and not stored and not isinstance(error, OSError):
        return None
    number = getattr(error, "errno", None) or (int(stored[2]) if stored else None)
    number = errno.ENOSPC if full else number
    # Of a rename, what is in the way is its destination.
    name = getattr(error, "filename2", None) or getattr(error, "filename", None)
    name = name or (stored and stored[1])
    name = os.fsdecode(name) if isinstance(name, str | bytes) else path
    where = shortened(os.fspath(name)) if name is not None else "the file"
    if number not in EXPLANATIONS:
        return f"{where}: {first_line(error)}; check the path and the disk"
    return EXPLANATIONS[number].format(path=where)


def sentence_of(error: BaseException, path: str | os.PathLike | None = None) -> str:
    """What to tell the user of a `UserError`, its own sentence, or of an `OSError`: `explain`'s."""
    return str(error) if isinstance(error, UserError) else str(explain(error, path))


def is_full(error: BaseException) -> bool:
    """Whether an error or its cause is a full disk or quota. TensorStore and SQLite report it only
    in their text.
    """
    chain: list[BaseException] = []
    at: BaseException | None = error
    while at is not None and at not in chain:
        chain.append(at)
        at = at.__cause__ or at.__context__
    texts = (*map(os.strerror, FULL), "database or disk is full")
    return any(
        getattr(each, "errno", None) in FULL or any(text in str(each) for text in texts)
        for each in chain
    )


def shortened(path: str, most: int = 200) -> str:
    """A path to print: control characters escaped, and the middle of a very long one left out."""
    path, half = printable(path), most // 2
    return path if len(path) <= most else f"{path[:half]}...{path[-half:]}"


# Reading


def read_text(
    path: str | os.PathLike, what: str, *, fix: str = DOWNLOAD_AGAIN, limit: int = 64 * MiB
) -> str:
    """The text of a UTF-8 file, with or without a byte-order mark.

    `what` says what the file is ("the recipe"), `fix` what the user should do where it is damaged.
    UserError, naming the file, where it is missing, not a regular file (a FIFO would block), larger
    than `limit` bytes, unreadable, or not UTF-8.
    """

    def refuse(reason: str) -> NoReturn:
        raise UserError(f"{shortened(os.fspath(path))}: {what} {reason}; {fix}")

    if "\0" in os.fspath(path):
        refuse("has a NUL byte in its path")
    try:
        if storage.is_remote(path):
            content = storage.read_bytes(path, 0, limit + 1)
            if len(content) > limit:
                refuse(f"is larger than {limit:,} bytes")
        else:
            content = _read_regular(path, refuse, limit)
    except FileNotFoundError:
        refuse("is missing")
    except OSError as error:
        raise UserError(explain(error, path)) from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{shortened(os.fspath(path))}: {what} is not UTF-8 text (byte {error.start});"
            f" save it as UTF-8, or {fix}"
        ) from None


def _read_regular(path: str | os.PathLike, refuse: Callable[[str], NoReturn], limit: int) -> bytes:
    # Without O_NONBLOCK, opening a FIFO that nobody writes to waits for ever.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe or device"
            refuse(f"is {kind}, not a file")
        if status.st_size > limit:
            refuse(f"is {status.st_size:,} bytes large, more than {limit:,}")
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(limit)
    finally:
        os.close(descriptor)


def read_json(
    path: str | os.PathLike,
    what: str,
    kind: type = dict,
    *,
    fix: str = DOWNLOAD_AGAIN,
    limit: int = 64 * MiB,
) -> Any:
    """The content of a JSON file, an object or another `kind`. UserError as for `read_text`, and
    where it is damaged, nested too deep, of another kind, or has numbers that are not finite.
    """
    text = read_text(path, what, fix=fix, limit=limit)
    return parse_json(text, f"{shortened(os.fspath(path))}: {what}", kind, fix=fix)


def parse_json(text: str, name: str, kind: type = dict, *, fix: str = DOWNLOAD_AGAIN) -> Any:
    """The content of a JSON text, such as a line of a JSONL file; `name` says in errors where it
    stands. UserError as for `read_json`.
    """

    def finite(number: str) -> float:
        value = float(number)
        if value - value != 0:
            raise ValueError(f"the number {number[:40]} is not finite")
        return value

    try:
        content = json.loads(text, parse_float=finite, parse_constant=finite)
        if "\\ud" in text.lower():
            # Half a surrogate pair can be read, but neither written nor printed.
            json.dumps(content, ensure_ascii=False).encode()
    except RecursionError:
        raise UserError(f"{name} is nested too deep; {fix}") from None
    except ValueError as error:
        raise UserError(f"{name} is damaged, not valid JSON ({first_line(error)}); {fix}") from None
    return _checked(content, name, kind, "JSON", fix)


def read_yaml(
    path: str | os.PathLike,
    what: str,
    kind: type = dict,
    *,
    fix: str = DOWNLOAD_AGAIN,
    limit: int = 4 * MiB,
) -> Any:
    """The content of a YAML file, a mapping or another `kind`; an empty file is an empty mapping.
    UserError as for `read_text`, and where it is damaged, nested too deep, of another kind, or
    expands to more than 100,000 values by its aliases.
    """
    import yaml  # only for those who read YAML: `--help` answers at once

    name = f"{shortened(os.fspath(path))}: {what}"
    text = read_text(path, what, fix=fix, limit=limit)
    try:
        # PyYAML takes minutes over some thousand brackets before it gives up.
        brackets = (1 if bracket in "[{" else -1 for bracket in re.findall(r"[\[\]{}]", text))
        if max(accumulate(brackets), default=0) > MOST_NESTED:
            raise RecursionError
        content = yaml.safe_load(text)
        _check_expansion(content)
    except RecursionError:
        raise UserError(f"{name} is nested too deep; {fix}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f" in line {mark.line + 1}" if mark else ""
        reason = error.problem or error.context or "syntax"
        raise UserError(f"{name} is not valid YAML ({reason}{line}); {fix}") from None
    except (yaml.YAMLError, *PYYAML_ERRORS) as error:
        raise UserError(f"{name} is not valid YAML ({first_line(error)}); {fix}") from None
    return _checked(kind() if content is None else content, name, kind, "YAML", fix)


def _checked(content: Any, name: str, kind: type, form: str, fix: str) -> Any:
    if isinstance(content, kind):
        return content
    names: dict[type, str] = {dict: "an object of names and values", list: "a list"}
    raise UserError(f"{name} is not {names.get(kind, kind.__name__)} in {form}; {fix}")


def _check_expansion(content: Any, most: int = 100_000) -> None:
    """ValueError where a tree has too many nodes, each counted as often as an alias repeats it."""
    nodes, seen = [content], 0
    while nodes:
        node = nodes.pop()
        seen += 1
        if seen > most:
            raise ValueError(f"its aliases expand to more than {most:,} values")
        if isinstance(node, str):
            node.encode()  # half a surrogate pair: UnicodeEncodeError, which is a ValueError
        elif isinstance(node, dict):
            nodes += [*node.keys(), *node.values()]
        elif isinstance(node, list | tuple | set):
            nodes += node


def folder_digest(path: Path, head: int = 1 << 16) -> str:
    """16 hex digits that tell a folder (or a file) by the names and sizes of its files and the
    first `head` bytes of each: quick for a model of many GB. Of a bucket, by names and the store's
    versions. UserError where it cannot be read.
    """
    digest = hashlib.sha256()
    if storage.is_remote(path):
        digest.update(repr(sorted(storage.entries(path).items())).encode())
        return digest.hexdigest()[:16]
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    try:
        for file in files:
            name = file.relative_to(path).as_posix()
            digest.update(f"{name}\0{file.stat().st_size}\0".encode("utf-8", "surrogateescape"))
            with file.open("rb") as content:
                digest.update(content.read(head))
    except OSError as error:
        raise UserError(explain(error, path)) from error
    return digest.hexdigest()[:16]
