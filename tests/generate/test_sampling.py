import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llasa_jax.errors import UserError
from llasa_jax.generate import sampling
from llasa_jax.generate.sampling import SamplingSettings

ROWS, VOCAB = 3, 1000


@pytest.fixture(scope="module")
def scores():
    return jnp.asarray(np.random.default_rng(0).normal(0, 3, (ROWS, VOCAB)), jnp.float32)


@pytest.fixture(scope="module")
def history():
    return np.random.default_rng(1).integers(0, VOCAB, (ROWS, 50))


@pytest.fixture(scope="module")
def seen(history):
    seen = np.zeros((ROWS, VOCAB), bool)
    seen[np.arange(ROWS)[:, None], history] = True
    return seen


def hf(processor, history, scores):
    import torch

    return processor(torch.tensor(history), torch.tensor(np.asarray(scores))).numpy()


def test_each_processor_equals_transformers(scores, history, seen):
    import transformers as tf

    penalized = hf(tf.RepetitionPenaltyLogitsProcessor(1.3), history, scores)
    # XLA and PyTorch round a division differently in the last bit.
    np.testing.assert_allclose(
        sampling.penalize_repetition(scores, seen, 1.3), penalized, rtol=2e-7
    )
    allowed = np.arange(VOCAB) % 3 == 1
    suppressed = hf(
        tf.SuppressTokensLogitsProcessor(np.flatnonzero(~allowed).tolist()), history, scores
    )
    np.testing.assert_array_equal(sampling.keep_allowed(scores, allowed), suppressed)
    for k in (1, 7, VOCAB, 2 * VOCAB):
        np.testing.assert_array_equal(
            sampling.keep_top_k(scores, k), hf(tf.TopKLogitsWarper(k), history, scores)
        )
    for p in (1e-6, 0.3, 0.9, 0.999):
        theirs = hf(tf.TopPLogitsWarper(p), history, scores)
        for best in (1, 40, VOCAB):  # too few in all rows, in some, in none
            np.testing.assert_array_equal(sampling.keep_top_p(scores, p, best), theirs)


def test_ties_and_suppressed_tokens_as_in_transformers(history):
    """Whole numbers, so that many tie, and a third at -inf, as after `keep_allowed`."""
    import transformers as tf

    scores = np.random.default_rng(2).integers(-4, 5, (ROWS, VOCAB)).astype(np.float32)
    scores[:, ::3] = -np.inf
    scores = jnp.asarray(scores)
    for k in (1, 200, 900):
        np.testing.assert_array_equal(
            sampling.keep_top_k(scores, k), hf(tf.TopKLogitsWarper(k), history, scores)
        )
    # Which of the tied tokens go is arbitrary there, how many is not.
    for p in (0.05, 0.5, 0.95):
        theirs = np.sort(hf(tf.TopPLogitsWarper(p), history, scores))
        for best in (10, 300, VOCAB):
            ours = np.sort(sampling.keep_top_p(scores, p, best))
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("greedy", [True, False])
def test_the_whole_chain_equals_transformers(scores, history, seen, greedy):
    import transformers as tf

    settings = SamplingSettings(
        temperature=0 if greedy else 0.7, top_k=100, top_p=0.8, repetition_penalty=1.2
    )
    allowed = np.arange(VOCAB) >= 400
    processors = [
        tf.RepetitionPenaltyLogitsProcessor(1.2),
        tf.SuppressTokensLogitsProcessor(list(range(400))),
    ]
    if not greedy:
        processors += [
            tf.TemperatureLogitsWarper(0.7),
            tf.TopKLogitsWarper(100),
            tf.TopPLogitsWarper(0.8),
        ]
    expected = hf(tf.LogitsProcessorList(processors), history, scores)
    np.testing.assert_allclose(
        sampling.process(scores, seen, allowed, settings), expected, rtol=1e-6
    )


def test_draws_follow_the_softmax():
    """Chi-squared with 9 degrees of freedom: a correct sampler exceeds 45 for one seed in a
    million.
    """
    scores = jnp.array([-jnp.inf, 0.0, 1.0, 2.0, 0.5, -1.0, 3.0, 2.5, 1.5, -2.0, 0.2])
    n = 20_000
    draws = sampling.draw(
        jnp.tile(scores, (n, 1)), jax.random.split(jax.random.key(0), n), SamplingSettings()
    )
    counts = np.bincount(draws, minlength=len(scores))
    expected = n * np.asarray(jax.nn.softmax(scores))
    assert counts[0] == 0
    assert ((counts - expected)[1:] ** 2 / expected[1:]).sum() < 45


def test_greedy_takes_the_best(scores):
    keys = jax.random.split(jax.random.key(0), ROWS)
    np.testing.assert_array_equal(
        sampling.draw(scores, keys, SamplingSettings(temperature=0)), scores.argmax(-1)
    )


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_p": 0.0},
        {"top_p": 1.2},
        {"top_k": -1},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": float("inf")},
        {"seed": -1},
        {"seed": 2**40},
    ],
)
def test_meaningless_settings_are_refused(bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        SamplingSettings(**bad)
