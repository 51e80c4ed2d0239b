"""Places in the data, from all hosts."""

from types import SimpleNamespace

import pytest

from llasa_jax.errors import UserError
from llasa_jax.runtime import hosts
from llasa_jax.train.places import gathered_places


def gathered(monkeypatch, *parts):
    """What the first host gathers; `parts` are what each host reads, stream to place."""
    every = [{str(stream): {"next": at} for stream, at in part.items()} for part in parts]

    def everyones(own):
        assert own == every[0]
        return every

    monkeypatch.setattr(hosts, "everyones", everyones)
    state = {"parents": [{"next": at} for at in parts[0].values()]}
    data = SimpleNamespace(get_state=lambda: state)
    return [place["next"] for place in gathered_places(data, [*parts[0]], 4)]


def test_every_stream_once_in_order(monkeypatch):
    assert gathered(monkeypatch, {0: 5, 1: 6, 2: 7, 3: 8}) == [5, 6, 7, 8]
    # Hosts that share a stream, as those do whose rows are of it
    assert gathered(monkeypatch, {0: 5, 1: 6}, {1: 6, 2: 7}, {3: 8}, {3: 8}) == [5, 6, 7, 8]


def test_hosts_that_differ_are_found(monkeypatch):
    with pytest.raises(UserError, match="read stream 1 of the data are at different places"):
        gathered(monkeypatch, {0: 5, 1: 6}, {1: 7, 2: 7}, {3: 8})
