"""Packing: every clip whole, once, in its own segment, in an order that is seeded."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import config_of, hf_llama, our_llama, params_of

from llasa_jax.data.batching import BatchShape, Source, batches, measure, pack_rows
from llasa_jax.errors import UserError
from llasa_jax.model.loss import chunked_cross_entropy
from llasa_jax.speech.prompts import Prompter, Utterance
from llasa_jax.speech.settings import PromptSettings

SHAPE = BatchShape(accumulation=2, rows=4, length=512)


@pytest.fixture(scope="module")
def clips():
    rng = np.random.default_rng(0)
    return [
        Utterance(
            "some words",
            rng.integers(0, 65_536, rng.integers(50, 250)).astype(np.uint16),
            f"clip{i}",
        )
        for i in range(150)
    ]


def segments(batch):
    """Every packed clip of a batch, as dicts of its slices."""
    rows = {name: array.reshape(-1, array.shape[-1]) for name, array in batch.items()}
    for r in range(len(rows["tokens"])):
        for segment in range(1, rows["segment_ids"][r].max() + 1):
            where = rows["segment_ids"][r] == segment
            yield {name: array[r][where] for name, array in rows.items()}


def test_every_clip_once_and_whole(prompter, clips):
    found = [
        s["tokens"].tobytes()
        for batch in batches([Source(clips, prompter)], SHAPE, seed=0, repeat=False)
        for s in segments(batch)
    ]
    assert sorted(found) == sorted(prompter.example(clip).tokens.tobytes() for clip in clips)


def test_records_that_cannot_be_read_are_passed_over(prompter, clips):
    gaps = [None if i % 10 == 3 else clip for i, clip in enumerate(clips)]
    fit = measure([Source(gaps, prompter)], SHAPE.length, seed=0)
    assert fit.clips == 135
    found = [
        s["tokens"].tobytes()
        for batch in batches([Source(gaps, prompter)], SHAPE, seed=0, repeat=False)
        for s in segments(batch)
    ]
    assert sorted(found) == sorted(prompter.example(clip).tokens.tobytes() for clip in gaps if clip)
    training = iter(batches([Source(gaps, prompter)], SHAPE, seed=0))
    assert next(training)["tokens"].shape == (2, 4, 512)


def test_rows(prompter, clips):
    for batch in batches([Source(clips, prompter)], SHAPE, seed=0, repeat=False):
        assert {name: (array.shape, array.dtype.name) for name, array in batch.items()} == {
            "tokens": ((2, 4, 512), "int32"),
            "targets": ((2, 4, 512), "int32"),
            "loss_mask": ((2, 4, 512), "bool"),
            "segment_ids": ((2, 4, 512), "int32"),
            "positions": ((2, 4, 512), "int32"),
        }
        for s in segments(batch):
            n = len(s["tokens"])
            np.testing.assert_array_equal(s["positions"], np.arange(n))
            np.testing.assert_array_equal(s["targets"][:-1], s["tokens"][1:])
            learned = s["targets"][s["loss_mask"]]
            assert learned[0] == prompter.vocab.speech_start
            assert learned[-1] == prompter.vocab.speech_end
            assert len(learned) == len(prompter.vocab.codes_of(s["tokens"])) + 2
        assert not batch["loss_mask"][batch["segment_ids"] == 0].any()


def test_hidden_tokens_go_to_the_paddings_segment(clips, tokenizer):
    prompter = Prompter(tokenizer, PromptSettings(mask="upstream"))
    batch = next(iter(batches([Source(clips, prompter)], SHAPE, seed=0)))
    eot = batch["tokens"] == tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert eot.sum() > 10
    assert (batch["segment_ids"][eot] == 0).all()
    inside = np.flatnonzero(eot[0, 0])[0]
    assert batch["positions"][0, 0, inside] == inside
    assert batch["segment_ids"][0, 0, inside + 1] == 1


def test_without_packing_a_row_is_a_clip(prompter, clips):
    batch = next(iter(batches([Source(clips, prompter)], SHAPE, seed=0, pack=False)))
    np.testing.assert_array_equal(batch["segment_ids"].max(-1), 1)


def test_seeded_and_shuffled_anew_each_epoch(prompter, clips):
    def order(seed, count=40):
        iterator = iter(batches([Source(clips, prompter)], SHAPE, seed=seed))
        return [s["tokens"].tobytes() for _ in range(count) for s in segments(next(iterator))]

    first = order(0)
    assert first == order(0)
    assert first != order(1)
    assert set(first[:100]) != set(first[150:250])


def test_few_clips_are_packed_an_epoch_at_a_time(prompter, clips):
    iterator = iter(batches([Source(clips[:20], prompter)], BatchShape(1, 1, 512), seed=0))
    rows = measure([Source(clips[:20], prompter)], 512, seed=0).rows
    for _ in range(3):
        epoch = [s["tokens"].tobytes() for _ in range(rows) for s in segments(next(iterator))]
        assert sorted(epoch) == sorted(
            prompter.example(clip).tokens.tobytes() for clip in clips[:20]
        )


def test_resumes_from_its_state(prompter, clips):
    iterator = iter(batches([Source(clips, prompter)], SHAPE, seed=0))
    for _ in range(3):
        next(iterator)
    state = iterator.get_state()
    expected = [next(iterator) for _ in range(4)]
    again = iter(batches([Source(clips, prompter)], SHAPE, seed=0))
    again.set_state(state)
    for batch in expected:
        for name, array in next(again).items():
            np.testing.assert_array_equal(array, batch[name])


def test_long_clips_are_dropped_or_cut(prompter, clips):
    long = [*clips[:10], Utterance("some words", np.zeros(3000, np.uint16), "long")]
    fit = measure([Source(long, prompter)], 512, seed=0)
    assert (fit.clips, fit.too_long, fit.exact) == (10, 1, True)
    assert fit.tokens == sum(len(prompter.example(clip).tokens) for clip in clips[:10])
    assert (
        sum(
            1
            for batch in batches([Source(long, prompter)], SHAPE, seed=0, repeat=False)
            for _ in segments(batch)
        )
        == 10
    )
    cut = [
        s
        for batch in batches([Source(long, prompter)], SHAPE, seed=0, repeat=False, too_long="cut")
        for s in segments(batch)
    ]
    assert len(cut) == 11
    assert max(len(s["tokens"]) for s in cut) == 512
    with pytest.raises(UserError, match="none of the clips fits rows of 512 tokens"):
        measure([Source(long[-1:], prompter)], 512, seed=0)


def test_a_sample_measures_many(prompter, clips):
    exact, sampled = (
        measure([Source(clips, prompter)], 512, seed=0),
        measure([Source(clips, prompter)], 512, seed=0, sample=50),
    )
    assert not sampled.exact
    assert abs(sampled.tokens / exact.tokens - 1) < 0.1


@pytest.fixture(scope="module")
def ljspeech():
    """Lengths like LJSpeech's: 1.11 to 10.10 s, 6.57 on average, deviation 2.2, more long ones than
    short; some 15 characters a second.
    """
    return [
        ljspeech_clip(i, 1.11 + 8.99 * share)
        for i, share in enumerate(np.random.default_rng(0).beta(1.83, 1.19, 6000))
    ]


def ljspeech_clip(i, seconds):
    return Utterance(
        "word " * round(seconds * 3), np.full(int(seconds * 50) + 1, i % 65_536, np.uint16), str(i)
    )


def test_ljspeech_lengths_fill_the_rows(prompter, ljspeech):
    lengths = [len(prompter.example(clip).tokens) for clip in ljspeech[:1500]]
    assert np.mean([len(clip.codes) / 50 for clip in ljspeech]) == pytest.approx(6.57, abs=0.1)
    iterator = iter(batches([Source(ljspeech, prompter)], BatchShape(1, 8, 2048), seed=0))
    windows = [next(iterator)["segment_ids"] for _ in range(50)]
    assert np.mean([(segment_ids > 0).mean() for segment_ids in windows]) > 0.985
    # And no batch is emptier than the others, as the last of a window might be.
    assert np.mean([(segment_ids > 0).mean() for segment_ids in windows[-25:]]) > 0.98
    assert len(pack_rows(lengths, 2048)) * 2048 < sum(lengths) / 0.985


@pytest.mark.parametrize("capacity", [100, 257])
def test_rows_hold_every_clip_once(capacity):
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 101, 500).tolist()
    rows = pack_rows(lengths, capacity)
    assert sorted(sum(rows, [])) == list(range(500))
    assert max(sum(lengths[i] for i in row) for row in rows) <= capacity
    # No two rows could have been one.
    emptiest = sorted(sum(lengths[i] for i in row) for row in rows)[:2]
    assert sum(emptiest) > capacity
    assert pack_rows([], 10) == []


def test_early_rows_hold_as_many_clips_as_late_ones():
    """Or each window would begin with longer clips than it ends with."""
    seconds = 1.11 + 8.99 * np.random.default_rng(0).beta(1.83, 1.19, (120, 1024))
    windows = [
        pack_rows(lengths, 2048)[:190] for lengths in (60 + 53 * seconds).astype(int).tolist()
    ]
    clips = np.array([[len(row) for row in rows] for rows in windows])
    # 11,400 rows on either side, deviating by 1.4 clips: three standard errors.
    # In the order of their first or longest clips it is 0.07 or more.
    assert abs(clips[:, :95].mean() - clips[:, 95:].mean()) < 0.055


@pytest.mark.slow
def test_packed_rows_learn_as_padded_ones_do(clips, tokenizer, prompter):
    """Summed loss and gradients in float32: the same sums in another order."""
    hf = hf_llama(vocab=len(tokenizer), initializer_range=0.1)
    config, params = config_of(hf), params_of(hf)

    def learn(batch):
        batch = {name: jnp.asarray(array[0]) for name, array in batch.items()}

        def nats(params):
            model = our_llama(config, params)
            hidden = model(batch["tokens"], batch["positions"], batch["segment_ids"])
            return chunked_cross_entropy(
                *model.output_factors(hidden),
                batch["targets"],
                batch["loss_mask"],
                vocab_size=len(tokenizer),
                chunk=64,
            )[0] / sum(len(clip.codes) + 2 for clip in few)

        return jax.value_and_grad(nats)(params)

    few = clips[:7]
    (packed,), (padded,) = (
        list(
            batches(
                [Source(few, prompter)],
                BatchShape(1, rows, 512),
                seed=0,
                repeat=False,
                pack=rows == 4,
            )
        )
        for rows in (4, 7)
    )
    assert packed["segment_ids"].max() > 1
    assert padded["segment_ids"].max() == 1
    (loss, grads), (expected_loss, expected_grads) = learn(packed), learn(padded)
    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-5)
    for grad, expected in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        np.testing.assert_allclose(grad, expected, atol=1e-5 * np.abs(expected).max(), rtol=1e-5)


def test_batches_made_ahead_are_the_same_and_so_is_their_place(prompter, clips):
    """The same batches and states as without the thread; a state of either goes into the other, at
    the start or while running.
    """

    def start(ahead):
        return iter(batches([Source(clips, prompter)], SHAPE, seed=0, ahead=ahead))

    def take(iterator, count):
        return [(next(iterator), iterator.get_state()) for _ in range(count)]

    def assert_same(found, expected):
        for (batch, state), (wanted, wanted_state) in zip(found, expected, strict=True):
            assert state == wanted_state
            for name in wanted:
                np.testing.assert_array_equal(batch[name], wanted[name])

    expected = take(start(0), 60)
    ahead, plain = start(4), start(0)
    assert ahead.get_state() == plain.get_state()
    assert_same(take(ahead, 60), expected)
    for restored in (ahead, start(4), start(0)):  # the live iterator, a new one, one without thread
        restored.set_state(expected[2][1])
        assert restored.get_state() == expected[2][1]
        assert_same(take(restored, 20), expected[3:23])
        restored.close()
    assert not [t for t in threading.enumerate() if "grain-thread-prefetch" in t.name]


def test_batches_are_made_before_they_are_asked_for(prompter, clips):
    """While the first of 40 batches is in use, the records of at least four windows (of 150 clips)
    are read. Without the thread it would be one window and what Grain reads ahead of it.
    """
    read = []
    many_are_read = threading.Event()

    class Watched(list):
        def __getitem__(self, at):
            read.append(at)
            if len(read) > 4 * len(clips):
                many_are_read.set()
            return super().__getitem__(at)

    iterator = iter(batches([Source(Watched(clips), prompter)], SHAPE, seed=0, ahead=40))
    next(iterator)
    assert many_are_read.wait(60)
    iterator.close()
