"""When a first loss is worth a word: never for a sound finetuning or a new model, once for what has
cost people weeks.
"""

import math

import pytest

from llasa_jax.train.progress import LossAlarm

VOCAB = 193_800


def words(losses, vocab=VOCAB, share=0.99, first=1):
    alarm = LossAlarm(vocab)
    return [
        said for step, loss in enumerate(losses, first) if (said := alarm.listen(step, loss, share))
    ]


@pytest.mark.parametrize(
    "losses",
    [
        [7.2, 6.5, 6.0, 5.5],
        [math.log(VOCAB) + 0.05, 12.1, 11.5, 11.0],  # a new model, from chance down
        [6.0] * 21 + [1.5],  # a voice learned by heart, later on
    ],
)
def test_sound_starts_pass_in_silence(losses):
    assert not words(losses)


def test_the_demo_passes_in_silence():
    assert not words([11.1, 9.2, 5.5, 3.7, 2.3], vocab=66_500)


def test_text_says_nothing_about_codes():
    assert not words([1.2, 1.1], share=0.3)


def test_a_run_that_goes_on_passes_in_silence():
    assert not words([0.5], first=500)


@pytest.mark.parametrize(
    ("losses", "cause"),
    [
        ([0.45, 0.4, 0.4], "constant or noise"),
        ([6.0, 5.0, 1.9, 1.8], "constant or noise"),
        ([11.3, 11.2, 11.2], "another codec"),
        ([15.0, 14.0], "the vocabulary's offset, or the tokenizer"),
        ([math.log(VOCAB), 13.0], "tokenizer"),
    ],
)
def test_one_clear_warning(losses, cause):
    (said,) = words(losses)
    assert cause in said
    assert "nats a token at step" in said
    assert "starts at about 5 to 7" in said
