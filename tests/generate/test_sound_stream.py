"""Sound while codes come: when the first of it is there, and what is left out at the end."""

import numpy as np
from scripted_voice import ShowingCodec

from llasa_jax.generate.sound import SoundStream

LOUD, QUIET = 60_000, 0
NOTHING = np.empty(0, np.uint16)


def waves_of(codes, size, tail=0.5, prompt=NOTHING):
    """The waves, and how many codes were there when each of them came."""
    stream, came = SoundStream(ShowingCodec(), prompt, tail), []
    for at in range(0, len(codes), size):
        came += [(wave, at + size) for wave in stream.feed(codes[at : at + size])]
    return came + [(wave, len(codes)) for wave in stream.end()]


def test_first_sound_comes_within_half_a_second_of_codes():
    codes = np.random.default_rng(0).integers(40_000, 60_000, 200).astype(np.uint16)
    came = waves_of(codes, 1, prompt=np.full(300, 7, np.uint16))
    assert came[0][1] == 24
    # From then on a chunk of 12 codes comes for every 12: no listener waits.
    assert [there for _, there in came[:5]] == [24, 36, 48, 60, 72]
    said = np.concatenate([wave for wave, _ in came])
    np.testing.assert_allclose(said, ShowingCodec().decode(codes), atol=1e-6)


def test_silence_is_held_until_sound_comes_after_it():
    codes = np.array([LOUD] * 30 + [QUIET] * 60 + [LOUD] * 10 + [QUIET] * 100, np.uint16)
    whole = ShowingCodec().decode(codes)
    for size in (1, 6, 64):
        said = np.concatenate([wave for wave, _ in waves_of(codes, size)])
        np.testing.assert_allclose(said, whole[: 100 * 320 + 8000], atol=1e-6)
    said = np.concatenate([wave for wave, _ in waves_of(codes, 6, tail=0)])
    np.testing.assert_allclose(said, whole[: 100 * 320], atol=1e-6)
