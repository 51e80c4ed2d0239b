"""The places in a run's streams of data as checkpoints keep them: all of them."""

import json
from collections.abc import Sequence
from pathlib import Path

import grain

from llasa_jax.errors import UserError
from llasa_jax.runtime import hosts


def gathered_places(data: grain.DatasetIterator, here: Sequence[int], streams: int) -> list[dict]:
    """The place in every one of the `streams`, from the hosts that read it; this one reads `here`,
    by `data`. All hosts must ask. UserError where hosts are at different places in one stream.
    """
    own = dict(zip(map(str, here), data.get_state()["parents"], strict=True))
    places: dict[str, dict] = {}
    for part in hosts.everyones(own):
        for stream, place in part.items():
            if places.setdefault(stream, place) != place:
                raise UserError(
                    f"the hosts that read stream {stream} of the data are at different places in"
                    " it; a file that only some of them can read would be the cause"
                )
    return [places[str(stream)] for stream in range(streams)]


def old_places(folder: Path, streams: int) -> list[dict]:
    """Of a run of an older version, in which each host had a stream and wrote its place."""
    files = [folder / f"process_{stream}-of-{streams}.json" for stream in range(streams)]
    return [json.loads(file.read_text()) for file in files]
