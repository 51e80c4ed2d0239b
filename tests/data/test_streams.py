"""The data in streams: the same batches on any number of hosts, bit for bit, and a place in them
that any number of hosts can go on from.
"""

import hashlib
from collections import Counter

import numpy as np
import pytest

from llasa_jax.data.batching import BatchShape, Source, batches, drawn, measure, streams_of
from llasa_jax.errors import UserError
from llasa_jax.speech.prompts import Utterance
from llasa_jax.train.parsing import parse_settings

SHAPE = BatchShape(accumulation=2, rows=8, length=256)
HOSTS = (1, 2, 4, 8)


@pytest.fixture(scope="module")
def sources(prompter):
    """Two of them, of which 200 clips and 40 make an epoch."""
    rng = np.random.default_rng(0)

    def clips(name, count):
        return [
            Utterance(
                "some words",
                rng.integers(0, 65_536, rng.integers(20, 120)).astype(np.uint16),
                f"{name}{i}",
            )
            for i in range(count)
        ]

    return [Source(clips("a", 200), prompter, 5.0), Source(clips("b", 300), prompter)]


def rows_of(host, hosts):
    each = SHAPE.rows // hosts
    return range(host * each, (host + 1) * each)


def start(sources, here, streams, **options):
    return iter(batches(sources, SHAPE, seed=3, streams=streams, here=here, **options))


def global_batches(parts, count):
    """Batches put together from the rows of all hosts, in the order of `parts`."""
    for _ in range(count):
        several = [next(part) for part in parts]
        yield {name: np.concatenate([one[name] for one in several], 1) for name in several[0]}


def same(found, wanted):
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        for name in other:
            np.testing.assert_array_equal(one[name], other[name], strict=True)


@pytest.mark.parametrize("streams", [1, 4])
def test_the_same_batches_on_any_number_of_hosts(sources, streams):
    """Eight batches are more than an epoch. At the fifth the hosts stop, and all numbers of hosts
    go on from the place of one.
    """
    wanted = list(global_batches([start(sources, None, streams)], 8))
    places: dict[int, dict] = {}
    for hosts in HOSTS:
        shares = [rows_of(host, hosts) for host in range(hosts)]
        parts = [start(sources, here, streams) for here in shares]
        same(list(global_batches(parts, 5)), wanted[:5])
        known = {}
        for here, part in zip(shares, parts, strict=True):
            own = streams_of(here, SHAPE.rows, streams)
            for stream, place in zip(own, part.get_state()["parents"], strict=True):
                assert known.setdefault(stream, place) == place
        places = places or known
        assert places == known
        again = [start(sources, here, streams) for here in shares]
        for here, part in zip(shares, again, strict=True):
            own = streams_of(here, SHAPE.rows, streams)
            part.set_state({"parents": [places[stream] for stream in own]})
        same(list(global_batches(again, 3)), wanted[5:])


def test_rows_of_a_host_need_not_lie_together(sources):
    whole = next(start(sources, None, 4))
    here = [0, 3, 6]
    part = next(start(sources, here, 4))
    for name in whole:
        np.testing.assert_array_equal(part[name], whole[name][:, here])


def test_a_host_reads_the_clips_of_its_streams_alone(sources, prompter):
    class Watched(list):
        read: set[int] = set()

        def __getitem__(self, at):
            self.read.add(at)
            return super().__getitem__(at)

    few = Source(Watched(sources[0].records), prompter)
    iterator = iter(batches([few], SHAPE, seed=3, streams=4, here=rows_of(0, 4), window=8))
    next(iterator)
    iterator.close()
    # A window, and the 64 clips that Grain reads ahead, of the 200
    assert 0 < len(Watched.read) < 150


@pytest.mark.parametrize("streams", HOSTS)
def test_streams_have_the_draws_of_one(sources, streams):
    """The first 160 draws, each in one stream."""
    expected = Counter(
        sources[i].prompter.example(record).tokens.tobytes()
        for i, record in (drawn(sources, 3)[k] for k in range(160))
    )
    found: Counter[bytes] = Counter()
    for stream in range(streams):
        here = rows_of(stream, streams)
        iterator = start(sources, here, streams, window=160 // streams)
        first: list[bytes] = []
        while len(first) < 160 // streams:
            # A batch's rows in the order in which they were filled
            first += _clips(next(iterator))
        found.update(first[: 160 // streams])
    assert found == expected


def test_validation_does_not_depend_on_the_streams(sources):
    wanted = list(start(sources, None, 1, repeat=False))
    for hosts in HOSTS:
        parts = [start(sources, rows_of(h, hosts), 4, repeat=False) for h in range(hosts)]
        same(list(global_batches(parts, len(wanted))), wanted)
        assert not any(list(part) for part in parts)


@pytest.mark.parametrize("streams", [1, 4])
def test_measured_as_packed(sources, streams):
    """An epoch of the first source alone, whose rows are counted."""
    alone = [sources[0]]
    fit = measure(alone, 256, seed=3, streams=streams)
    assert fit.exact
    iterator = start(alone, None, streams)
    clips = rows = 0
    while clips < 200:
        batch = next(iterator)
        clips += batch["segment_ids"].max(-1).sum()
        rows += (batch["segment_ids"].max(-1) > 0).sum()
    assert rows == pytest.approx(fit.rows, abs=16)


def test_the_second_stream_of_two_is_always_the_same(sources):
    """A run's place in its data means something only while streams stay as they are."""
    found = hashlib.sha256()
    iterator = start(sources, rows_of(1, 2), 2)
    for _ in range(6):
        batch = next(iterator)
        for name in sorted(batch):
            found.update(batch[name].tobytes())
    assert found.hexdigest()[:16] == "322bf1fe7eb1cae4"


def test_how_many_streams(tmp_path):
    def streams(*given):
        return parse_settings(
            [f"--out={tmp_path}", "--model.path=m", "--data.path=d", *given]
        ).streams

    assert [streams(f"--train.rows={n}") for n in (1, 16, 31, 32, 48, 64, 512)] == [
        *(1, 1, 1, 2, 2, 4, 32)
    ]
    assert streams("--train.rows=12", "--data.streams=3") == 3
    with pytest.raises(UserError, match="data.streams=5 does not divide train.rows=12"):
        streams("--train.rows=12", "--data.streams=5")


def _clips(batch):
    rows = {name: batch[name].reshape(-1, SHAPE.length) for name in ("tokens", "segment_ids")}
    return [
        tokens[segments == segment].tobytes()
        for tokens, segments in zip(rows["tokens"], rows["segment_ids"], strict=True)
        for segment in range(1, segments.max() + 1)
    ]
