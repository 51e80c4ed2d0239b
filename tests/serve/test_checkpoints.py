"""Another checkpoint of the served run is loaded between two requests."""

import queue
import threading
from dataclasses import replace

import numpy as np
import pytest
from flax import nnx
from served import SAMPLING, SPEECH

from llasa_jax.convert import model_folder
from llasa_jax.demo.tiny import make_tiny_codec
from llasa_jax.errors import UserError
from llasa_jax.generate import steps
from llasa_jax.generate.line import Line, Speech
from llasa_jax.generate.speaker import Speaker
from llasa_jax.serve.engine import Engine, Request
from llasa_jax.serve.metrics import Metrics

pytestmark = pytest.mark.slow
LINE, LONG = Line("the quick brown fox"), replace(SPEECH, max_seconds=1.6)


@pytest.fixture
def run(tmp_path, model, tokenizer):
    """A run with checkpoints of steps 1 and 2, and a codec beside it."""
    graphdef, params = model
    config = nnx.merge(graphdef, params).config
    model_folder.write_description(tmp_path / "run", config, {"base_model": "tiny"})
    tokenizer.save_pretrained(tmp_path / "run" / model_folder.HF_FOLDER)
    for step, scale in ((1, 1.0), (2, -1.0)):
        changed = params | {"head": params["head"] * scale}
        model_folder.save_params(tmp_path / "run" / "checkpoints" / str(step), changed)
    make_tiny_codec(tmp_path / "codec")
    return tmp_path / "run"


def test_another_checkpoint_is_loaded_between_requests(run, monkeypatch):
    def loaded(step):
        codec = run.parent / "codec"
        return Speaker.load(run, codec=codec, dtype="float32", step=step, rows=2)

    speaker = loaded(1)
    engine = Engine(speaker, SAMPLING, LONG, Metrics())
    first = engine.say(LINE, 7)
    compiled = steps.advance._cache_size()
    # A request that is spoken ends with the weights that it began with, and the next has others.
    params = speaker.weights(2)
    monkeypatch.setattr(speaker, "weights", lambda step: params)  # at once, while it is spoken
    given = queue.Queue()
    engine.submit(Request(LINE, 7, True, given.put))
    begun = given.get()
    assert isinstance(begun, np.ndarray)
    loader = threading.Thread(target=engine.load, args=(2,))
    loader.start()
    while not isinstance(said := given.get(), Speech):
        assert isinstance(said, np.ndarray)
    np.testing.assert_array_equal(said.codes, first.codes)
    loader.join()
    monkeypatch.undo()
    second = engine.say(LINE, 7)
    assert second.codes.tolist() != first.codes.tolist()
    engine.load(1)
    np.testing.assert_array_equal(engine.say(LINE, 7).codes, first.codes)
    assert steps.advance._cache_size() == compiled
    with pytest.raises(UserError, match="no checkpoint of step 3; there are 1, 2"):
        engine.load(3)
    engine.load(2)
    np.testing.assert_array_equal(engine.say(LINE, 7).codes, second.codes)
    engine.close()
    # It is what that checkpoint says from the start.
    (fresh,) = (said for _, said in loaded(2).say([LINE], replace(SAMPLING, seed=7), LONG))
    np.testing.assert_array_equal(second.codes, fresh.codes)


def test_a_model_that_is_no_run_has_no_checkpoints(new_speaker):
    speaker = new_speaker()
    assert speaker.steps == []
    with pytest.raises(UserError, match="no checkpoint of step 1; there is none"):
        speaker.weights(1)
