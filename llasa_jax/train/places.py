"""The places in a run's streams of data as checkpoints keep them: all of them."""

from collections.abc import Sequence

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
