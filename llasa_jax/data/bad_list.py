"""What the lists of bad records share: the reason as a sentence, and a record as a line of JSON."""

import json

from llasa_jax.errors import UserError


def reason_of(error: Exception) -> str:
    """Why a record cannot be used. Decoders raise kinds of their own, which are named."""
    if isinstance(error, UserError | OSError):
        return str(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def as_json(record: dict) -> str:
    """A line of JSON. Names that are not UTF-8, which Python holds as lone surrogates, are escaped
    (\\udce9), since no file and no terminal takes them as they are.
    """
    return json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace").decode()
