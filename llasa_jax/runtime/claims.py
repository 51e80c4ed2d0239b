"""Claims on folders of a bucket, where there are no locks.

A claim is a numbered object in the folder's `.claims/`, which only one process can create: the
store refuses a second of that name. Its holder changes it every few seconds. One that stands still
for `LEASE` seconds, or whose process on this machine has ended, is abandoned, and whoever wants it
creates the next number. A holder that was cut off finds that number, and stops.
"""

import json
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from llasa_jax.errors import InUseError, UserError
from llasa_jax.runtime import storage

CLAIMS = ".claims"
BEAT, LEASE, POLL = 8.0, 30.0, 2.0  # seconds
LONG_AGO = 600.0  # seconds that no two clocks differ by


class Claim:
    """Holds a bucket's folder against other processes, from `with` on until its end; of this
    machine's folders nothing, which have locks. `doing` says in errors what the holder does.

    UserError where another process holds it: to see that it is alive may take `LEASE` seconds.
    """

    def __init__(self, folder: str | os.PathLike, doing: str):
        self._folder, self._doing = os.fspath(folder), doing
        self._number = 0
        self._who = {"host": socket.gethostname(), "process": _identity(), "id": uuid.uuid4().hex}
        self._lost, self._end = "", threading.Event()
        self._thread: threading.Thread | None = None

    def check(self) -> None:
        """UserError where another process has taken the folder over, since this one did not reach
        the bucket for long.
        """
        if self._lost:
            raise UserError(self._lost)

    def __enter__(self) -> "Claim":
        if not storage.is_remote(self._folder):
            return self
        self._take()
        self._thread = threading.Thread(target=self._keep, name="claim", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._end.set()
        if self._thread is None:
            return
        self._thread.join(1)
        with suppress(UserError):  # it will be found abandoned
            for number in sorted(self._numbers()):
                if number < self._number or not self._lost:
                    storage.remove(self._path(number))

    def _take(self) -> None:
        while True:
            newest = self._newest()
            if newest and not self._is_free(newest):
                raise InUseError(
                    f"another process ({self._holder(newest)}) is {self._doing} in {self._folder};"
                    " wait for its end or stop it, or choose another folder"
                )
            self._number = newest + 1
            if storage.create(self._path(self._number), self._content(0)):
                return

    def _is_free(self, number: int) -> bool:
        """Whether the holder of a claim has ended."""
        before = self._read(number)
        alive = _is_alive(before.get("process", ""))
        if alive is not None:
            return not alive
        if time.time() - before.get("time", 0) > LONG_AGO:
            return True
        print(
            f"waiting to see whether {self._holder(number)} is still {self._doing} in"
            f" {self._folder}",
            flush=True,
        )
        until = time.monotonic() + LEASE
        while time.monotonic() < until:
            time.sleep(POLL)
            now = self._read(number)
            if not now:
                return True
            if now != before:
                return False
        return True

    def _keep(self) -> None:
        beat = 0
        while not self._end.wait(BEAT):
            beat += 1
            try:
                newest = self._newest()
                if newest != self._number or self._read(newest).get("id") != self._who["id"]:
                    self._lost = (
                        f"another process has taken over {self._folder}, since this one did not"
                        " reach the bucket for long; it goes on there, and this one ends"
                    )
                    return
                storage.write_bytes(self._path(self._number), self._content(beat))
            except (UserError, OSError):
                continue  # the store may be back at the next beat

    def _content(self, beat: int) -> bytes:
        return json.dumps({**self._who, "beat": beat, "time": time.time()}).encode()

    def _numbers(self) -> list[int]:
        names = storage.entries(f"{self._folder}/{CLAIMS}")
        return [int(name) for name in names if name.isdecimal()]

    def _newest(self) -> int:
        return max(self._numbers(), default=0)

    def _read(self, number: int) -> dict:
        try:
            content = json.loads(storage.read_bytes(self._path(number)))
        except (FileNotFoundError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def _holder(self, number: int) -> str:
        return f"on {self._read(number).get('host', 'an unknown host')}"

    def _path(self, number: int) -> str:
        return f"{self._folder}/{CLAIMS}/{number:08}"


def _identity() -> str:
    """What tells this process from all others, on all machines: the boot of the machine and the
    container, the process's number and when it began.
    """
    return f"{_machine()} {os.getpid()} {_began(os.getpid())}"


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()}-{uuid.getnode()}"


def _began(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _is_alive(identity: str) -> bool | None:
    """Whether a process of this machine is still there; None of another machine's."""
    parts = identity.split(" ")
    if len(parts) != 3 or parts[0] != _machine() or not parts[2]:
        return None
    return _began(int(parts[1])) == parts[2]
