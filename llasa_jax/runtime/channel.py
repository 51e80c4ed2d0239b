"""A TCP connection between host 0 and every other host, beside JAX's own. On it hosts compare what
they are about to do, and learn within a second that another host failed or vanished, whatever their
main threads are busy with.

Messages are JSON objects, one a line:

    hello   host, count, name    the first message of a host
    joined                       host 0: all hosts are here
    beat                         every few seconds: a host that is silent for long is lost
    facts   facts                what this host is about to do
    agreed                       host 0: the facts of all hosts are equal
    failed  text, status, host   one host cannot go on: all end with its sentence
    done                         this host has finished; its connection may close

Only the standard library is used: JAX's own service is not there yet when hosts begin to compare,
and its errors end a process with a C++ stack.
"""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

from llasa_jax.errors import UserError, printable

BEAT = 5.0  # seconds between signs of life
LOST = 90.0  # seconds of silence after which a host counts as lost; a paused host gets that long
LINGER = 25.0  # seconds in which a failed host waits for those that are still starting
GOODBYE = 5.0  # seconds in which a failed host waits for the others to end
LONGEST = 16 << 20  # bytes of a message
STARTING = 15.0  # seconds after which a waiting host says whom it waits for


class Connection:
    """One end of a connection: sends messages from any thread, and receives them in one thread."""

    def __init__(self, sock: socket.socket):
        sock.settimeout(None)
        # The kernel notices a machine that is gone even where nothing is sent.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._socket, self._file = sock, sock.makefile("rb")
        self._lock = threading.Lock()
        self.heard = time.monotonic()
        self.closed = threading.Event()

    def send(self, **message: Any) -> None:
        """Sends a message; nothing happens where the other end is gone, as its reader sees that."""
        data = json.dumps(message).encode() + b"\n"
        # One lock a connection: two threads' messages must not mix within a line.
        with contextlib.suppress(OSError), self._lock:
            self._socket.sendall(data)

    def receive(self) -> dict | None:
        """The next message, None where the other end is gone or sends anything else."""
        try:
            # A limit, so that whoever connects cannot fill the memory with one line.
            line = self._file.readline(LONGEST)
            message = json.loads(line) if line.endswith(b"\n") else None
        except (OSError, ValueError, RecursionError):
            message = None
        self.heard = time.monotonic()
        if not isinstance(message, dict):
            self.closed.set()
            return None
        return message

    def drain(self, seconds: float) -> None:
        """Waits until the other end is gone, in the thread that receives from it."""
        self._socket.settimeout(seconds)
        while self.receive():
            pass


class Channel:
    """This host's side. `address` is host 0's name and the channel's port, `host` this host's
    number among `count`.

    Once all are `join`ed, a failure or the disappearance of another host ends this process: its
    sentence goes to stderr, and the status is the other host's. UserError where the hosts cannot
    come together within `timeout` seconds.
    """

    def __init__(self, address: tuple[str, int], host: int, count: int, timeout: float):
        self.address, self.host, self.count, self.timeout = address, host, count, timeout
        self.names = {host: socket.gethostname()}
        self._peers: dict[int, Connection] = {}  # on host 0 all others, elsewhere host 0
        self._facts: dict[int, dict] = {}
        self._changed = threading.Condition()
        self._joined = self._agreed = False
        self._failing = self._done = False
        self._released = threading.Event()  # a failed host may end: the others know
        self._finished: set[int] = set()
        self._server: socket.socket | None = None

    # Coming together

    def join(self) -> None:
        """Waits until all hosts are connected."""
        deadline = time.monotonic() + self.timeout
        self.connect(deadline)
        threading.Thread(target=self._beat, daemon=True, name="llasa-jax beat").start()
        self._wait(lambda: self._joined, deadline)

    def connect(self, deadline: float) -> None:
        """Begins to listen on host 0, and reaches host 0 from the others."""
        if self.host:
            self._reach_first_host(deadline)
        else:
            self._listen()

    def _listen(self) -> None:
        port = self.address[1]
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        try:
            self._server = socket.create_server(
                ("", port), family=family, dualstack_ipv6=dual, backlog=self.count + 8
            )
        except OSError as error:
            self._report_second_first_host()
            raise UserError(
                f"port {port} on host 0 cannot be opened ({error.strerror or error}): another run"
                " uses it, or two processes are both started as process 0; end the other one, or"
                " choose another JAX_COORDINATOR_ADDRESS"
            ) from error
        threading.Thread(target=self._accept, daemon=True, name="llasa-jax accept").start()

    def _report_second_first_host(self) -> None:
        """Tells the process that has the port that this one takes itself for host 0 as well."""
        with contextlib.suppress(OSError):
            peer = Connection(socket.create_connection(("localhost", self.address[1]), GOODBYE))
            peer.send(kind="hello", host=0, count=self.count, name=self.names[0])
            peer.closed.wait(0.5)

    def _accept(self) -> None:
        while self._server:
            try:
                sock, _ = self._server.accept()
            except OSError:
                return  # closed at the end
            threading.Thread(
                target=self._greet, args=(Connection(sock),), daemon=True, name="llasa-jax channel"
            ).start()

    def _greet(self, peer: Connection) -> None:
        hello = peer.receive()
        if not hello or hello.get("kind") != "hello":
            return  # a port scanner, or another program
        name, number = printable(str(hello.get("name"))), hello.get("host")
        number = number if isinstance(number, int) else -1
        problem = ""
        if hello.get("count") != self.count:
            problem = (
                f"host {number} ({name}) was started as one of {hello.get('count')} processes, host"
                f" 0 ({self.names[0]}) as one of {self.count}"
            )
        elif number in (0, *self._peers) or number not in range(self.count):
            problem = f"two processes ({self.names.get(number)} and {name}) are both host {number}"
        if problem:
            sentence = f"{problem}; start each process once, with the same number of processes"
            peer.send(kind="failed", text=sentence, status=2)
            self._end_all(sentence, 2, linger=GOODBYE)
        with self._changed:
            self._peers[number], self.names[number] = peer, name
            if len(self._peers) == self.count - 1 and not self._failing:
                self._joined = True
                for other in self._peers.values():
                    other.send(kind="joined", names=self.names)
            self._changed.notify_all()
        self._read(number, peer)

    def _reach_first_host(self, deadline: float) -> None:
        said, started = False, time.monotonic()
        while True:
            try:
                sock = socket.create_connection(self.address, 5)
                break
            except OSError as error:
                now = time.monotonic()
                if now > deadline:
                    raise UserError(
                        f"host {self.host} of {self.count}: host 0 at {self.address[0]}, port"
                        f" {self.address[1]}, cannot be reached ({error.strerror or error}); start"
                        " the same command on all hosts, and see that they reach each other"
                    ) from None
                if not said and now - started > STARTING:
                    said = True
                    _say(f"waiting for host 0 at {self.address[0]}, port {self.address[1]}")
                time.sleep(0.2)
        peer = Connection(sock)
        self._peers[0] = peer
        peer.send(kind="hello", host=self.host, count=self.count, name=self.names[self.host])
        threading.Thread(
            target=self._read, args=(0, peer), daemon=True, name="llasa-jax channel"
        ).start()

    def _wait(self, ready: Callable[[], bool], deadline: float | None = None) -> None:
        """Waits for a state that the readers bring about; UserError at the deadline."""
        said, started = False, time.monotonic()
        with self._changed:
            while not ready():
                self._changed.wait(0.5)
                if self._failing:
                    continue  # another thread is ending this process
                now = time.monotonic()
                missing = sorted({*range(self.count)} - {self.host, *self._peers})
                names = ", ".join(map(str, missing)) or "the others"
                if deadline and now > deadline:
                    raise UserError(
                        f"host {self.host} of {self.count} has waited {now - started:.0f} s for"
                        f" host {names}; start the same command on all hosts"
                    )
                if deadline and not said and now - started > STARTING:
                    said = True
                    _say(f"host {self.host} of {self.count} is waiting for host {names}")

    # What is received

    def _read(self, number: int, peer: Connection) -> None:
        while message := peer.receive():
            kind = message.get("kind")
            if kind in ("failed", "told"):
                self._released.set()
            if kind == "failed":
                self._hear_failure(number, peer, message)
            with self._changed:
                if kind == "joined":
                    self.names = {int(k): str(v) for k, v in message["names"].items()}
                    self._joined = True
                elif kind == "agreed":
                    self._agreed = True
                elif kind == "facts":
                    self._facts[number] = message["facts"]
                elif kind == "done":
                    self._finished.add(number)
                self._changed.notify_all()
        self._released.set()
        with self._changed:
            over = self._failing or self._done or number in self._finished
            self._changed.notify_all()
        if not over:
            self._lose(number, "its process was killed, or its machine or network is down")

    def _hear_failure(self, number: int, peer: Connection, message: dict) -> None:
        text, status = printable(str(message.get("text"))), int(message.get("status", 2))
        origin = message.get("host", number)
        if self._failing:
            return
        self._end_all(text if origin is None else f"{self._called(origin)}: {text}", status, number)

    def _lose(self, number: int, reason: str) -> None:
        self._end_all(
            f"{self._called(number)} vanished ({reason}); all hosts stop, and the same command goes"
            " on from the last checkpoint",
            1,
        )

    def _called(self, number: int) -> str:
        name = self.names.get(number)
        return f"host {number} of {self.count}" + (f" ({name})" if name else "")

    def _beat(self) -> None:
        while not (self._done or self._failing):
            time.sleep(BEAT)
            for number, peer in [*self._peers.items()]:
                # Both ways: each side knows of the other's silence by itself.
                peer.send(kind="beat")
                silent = time.monotonic() - peer.heard
                if silent > LOST and number not in self._finished and not self._done:
                    self._lose(number, f"nothing was heard of it for {silent:.0f} s")

    # The end

    def fail(self, text: str, status: int, linger: float | None = None) -> None:
        """Tells all other hosts why this one cannot go on, and waits a little until they have
        ended; this process must end next. Hosts that are still starting have `linger` seconds
        (by default `LINGER`) to come and hear it.
        """
        with self._changed:
            if self._failing or self._done:
                return
            self._failing = True
        if self.host:
            for peer in self._peers.values():
                peer.send(kind="failed", text=text, status=status)
                self._released.wait((LINGER if linger is None else linger) + GOODBYE)
        elif self._server:
            self._tell_all(text, status, 0, linger)

    def _end_all(
        self, sentence: str, status: int, origin: int | None = None, linger: float | None = None
    ) -> NoReturn:
        """Ends this process because of another host; host 0 passes the sentence on first. From any
        thread.
        """
        with self._changed:
            first, self._failing = not self._failing, True
        # Two hosts may fail at once: only the thread with the first sentence ends the process.
        if not first:
            threading.Event().wait()  # another thread is ending this process
        if not self.host:
            self._tell_all(sentence, status, origin, linger)
        _say(f"error: {sentence}")
        # Not sys.exit: the main thread may be inside a collective that never returns, and JAX's
        # exit functions would wait for the other hosts.
        os._exit(status)

    def _tell_all(
        self, text: str, status: int, origin: int | None, linger: float | None = None
    ) -> None:
        """Host 0: tells every host but the `origin` of a failure, those that are still starting
        too, and waits until they have ended: when host 0 ends, JAX aborts the others.
        """
        notified: set[int] = set()
        deadline = time.monotonic() + (LINGER if linger is None else linger)
        while True:
            for number, peer in [*self._peers.items()]:
                if number not in notified and number != origin:
                    # The sentence of another host names it already; one of host 0 does not.
                    source = 0 if origin == 0 else None
                    peer.send(kind="failed", text=text, status=status, host=source)
                    notified.add(number)
            # A host that connects only now gets it too; nobody else would send it.
            if len(self._peers) == self.count - 1 or time.monotonic() > deadline:
                break
            time.sleep(0.1)
        patience = time.monotonic() + GOODBYE
        for number in notified:
            self._peers[number].closed.wait(max(0, patience - time.monotonic()))
        if origin:
            self._peers[origin].send(kind="told")
            self._peers[origin].drain(GOODBYE)

    def finish(self) -> None:
        """This host has done its work: from now on, the end of another one is no failure."""
        with self._changed:
            if self._failing:
                return
            self._done = True
        for peer in self._peers.values():
            peer.send(kind="done")
        if self._server:
            self._server.close()

    # Agreement

    def agree(self, facts: dict[str, Any], fix: str) -> None:
        """Returns on all hosts once the `facts` of all are equal. UserError on all hosts that names
        the first facts that differ, with every host's value, and the `fix`.
        """
        facts = json.loads(json.dumps(facts, default=str))
        if self.host:
            with self._changed:
                self._agreed = False
            self._peers[0].send(kind="facts", facts=facts)
            self._wait(lambda: self._agreed)
            return
        self._wait(lambda: len(self._facts) == self.count - 1)
        with self._changed:
            everyones, self._facts = {0: facts} | self._facts, {}
        if differences := _differences(everyones):
            more = f" (and {len(differences) - 3} more)" if len(differences) > 3 else ""
            raise UserError(f"the hosts differ: {'; '.join(differences[:3])}{more}; {fix}")
        for peer in self._peers.values():
            peer.send(kind="agreed")


def _differences(everyones: dict[int, dict]) -> list[str]:
    """For every fact that is not the same on all hosts: its name, and its value on every host."""
    names = dict.fromkeys(name for facts in everyones.values() for name in facts)
    found = []
    for name in names:
        hosts_of: dict[str, list[int]] = {}
        for host, facts in sorted(everyones.items()):
            value = json.dumps(facts[name], ensure_ascii=False) if name in facts else "absent"
            hosts_of.setdefault(printable(value)[:200], []).append(host)
        if len(hosts_of) > 1:
            values = ", ".join(
                f"{value} on host {', '.join(map(str, hosts[:8]))}{' ...' * (len(hosts) > 8)}"
                for value, hosts in hosts_of.items()
            )
            found.append(f"{name} is {values}")
    return found


def _say(line: str) -> None:
    # Not print: the main thread may hold the lock of stderr.
    os.write(2, f"llasa-jax: {line}\n".encode("utf-8", "backslashreplace"))
