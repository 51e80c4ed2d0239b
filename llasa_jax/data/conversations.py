"""Written conversations for models that keep their chat: a JSONL file, or any table whose rows hold
`messages`.
"""

import json
import os
from collections.abc import Sequence

import numpy as np

from llasa_jax.errors import UserError, first_line
from llasa_jax.runtime.copies import local_copy
from llasa_jax.speech.prompts import Conversation

_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}


class Conversations(Sequence[Conversation]):
    """A JSONL file with random access. Picklable: lines are read when asked for, and only where
    they begin is kept in memory.

    A line is an object with `messages`, a list of {"role": ..., "content": ...}; or
    `conversations`, a list of {"from": "human" or "gpt", "value": ...}, as Infinity-Instruct has
    it. Its `id` is optional. A `system` beside them is the text of a system turn.
    """

    def __init__(self, path: str | os.PathLike):
        self._path = local_copy(path)
        if not self._path.is_file():
            raise UserError(f"{path}: no such file; give a .jsonl file of conversations")
        with self._path.open("rb") as file:
            lengths, blank = (
                zip(*((len(line), not line.strip()) for line in file), strict=True)
                if os.path.getsize(self._path)
                else ((), ())
            )
        ends = np.cumsum(lengths, dtype=np.int64)
        self._lines = np.flatnonzero(~np.array(blank, bool))
        self._starts, self._ends = (ends - lengths)[self._lines], ends[self._lines]
        if not len(self._lines):
            raise UserError(f"{path}: no conversations; give at least one")

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> Conversation:  # type: ignore[override]
        """UserError names the line that is no conversation."""
        with self._path.open("rb") as file:
            file.seek(self._starts[index])
            line = file.read(self._ends[index] - self._starts[index])
        where = f"{self._path}, line {self._lines[index] + 1}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{where}: not JSON ({first_line(error)}); write one JSON object on each line"
            ) from None
        return conversation(row, where)


def conversation(row: dict, where: str) -> Conversation:
    """A table's row as a `Conversation`; a system turn without words is left out. UserError
    beginning with `where` for a row of another form.
    """
    turns = row.get("messages") or row.get("conversations") if isinstance(row, dict) else None
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise UserError(
            f'{where}: no messages; give "messages": [{{"role": "user", "content": "..."}}, ...]'
        )
    messages: list[dict[str, str]] = []
    system = row.get("system")  # LLaMA-Factory's place for it
    if isinstance(system, str) and system.strip():
        if any("system" in (turn.get("role"), turn.get("from")) for turn in turns):
            raise UserError(
                f"{where}: has a system text beside the messages and a system turn in them; keep"
                " one of the two"
            )
        turns = [{"role": "system", "content": system}, *turns]
    for turn in turns:
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        role = _SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else None
        if role not in ("system", "user", "assistant") or not isinstance(content, str):
            raise UserError(
                f"{where}: a message has role {role!r} and content {content!r:.40}; roles are"
                " system, user and assistant, with text"
            )
        if any("\ud800" <= character <= "\udfff" for character in content):
            raise UserError(f"{where}: a message has half of a surrogate pair; correct the text")
        if role != "system" or content.strip():
            messages.append({"role": role, "content": content})
    return Conversation(messages, str(row.get("id", where)))
