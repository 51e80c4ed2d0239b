"""The page to listen, in headless Chromium where there is one."""

import json
import os
import shutil
import socket
import threading
import time

import numpy as np
import pandas as pd
import pytest
import uvicorn
from served import LIMITS, SAMPLING, SPEECH

gradio = pytest.importorskip("gradio", reason="needs the extra ui")

from llasa_jax.generate.line import Line  # noqa: E402
from llasa_jax.serve import server  # noqa: E402
from llasa_jax.serve.app import new_app  # noqa: E402
from llasa_jax.serve.engine import Engine  # noqa: E402
from llasa_jax.serve.metrics import Metrics  # noqa: E402
from llasa_jax.serve.page import VERDICTS, Trial  # noqa: E402
from llasa_jax.serve.runs import (  # noqa: E402
    curve_of,
    evaluations_below,
    numbers_of,
    runs_below,
)
from llasa_jax.serve.voices import Voices  # noqa: E402
from llasa_jax.speech.audio import write_audio  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]
CHROMIUM = shutil.which("chromium")


@pytest.mark.parametrize("is_swapped", [False, True])
def test_a_verdict_counts_for_the_side_that_was_played(is_swapped):
    trial = Trial(("soft", "loud"), is_swapped, is_open=True)
    for verdict in (VERDICTS[0], VERDICTS[0], VERDICTS[2]):
        trial = trial.judge(verdict)
    won = "soft: 0, loud: 2" if is_swapped else "soft: 2, loud: 0"
    assert str(trial) == f"{won}, no difference: 1"
    assert not trial.is_open


@pytest.fixture
def runs(tmp_path):
    """Two runs, one of which is being written, and an evaluation."""
    for name, losses in (("old", [7.0, 6.0]), ("new", [5.0, 4.0, 3.0])):
        run = tmp_path / name
        lines = [json.dumps({"step": at, "loss": loss}) for at, loss in enumerate(losses, 1)]
        (run / "samples").mkdir(parents=True)
        (run / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 9, "lo']))
        write_audio(run / "samples" / "000003_0.wav", np.full(1600, 0.5, np.float32))
    os.utime(tmp_path / "old" / "metrics.jsonl", (0, 0))
    (tmp_path / "score").mkdir()
    (tmp_path / "score" / "results.json").write_text("{}")
    (tmp_path / "score" / "index.html").write_text("<h1>WER 3%</h1>")
    return tmp_path


def test_runs_and_evaluations_are_found_by_name(runs):
    assert list(runs_below(runs)) == ["new", "old"]
    table = numbers_of(runs / "new")
    assert curve_of(table, "loss")["value"].tolist() == [5.0, 4.0, 3.0]
    assert not len(curve_of(table, "none"))
    assert list(evaluations_below(runs)) == ["score"]
    many = pd.DataFrame({"step": range(9000), "loss": range(9000)})
    assert 1000 < len(curve_of(many, "loss")) <= 2000


@pytest.fixture
def page(new_speaker, runs):
    """A browser's page, and the engine behind it."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    if not CHROMIUM:
        pytest.skip("needs chromium")
    metrics, voices = Metrics(), Voices("tiny", {}, ["ada"])
    engine = Engine(new_speaker(), SAMPLING, SPEECH, metrics)
    app = new_app(engine, voices, LIMITS, metrics)
    app = server.with_page(app, engine, voices, LIMITS, "", runs)
    where = socket.create_server(("127.0.0.1", 0))
    web = uvicorn.Server(uvicorn.Config(app, log_level="critical"))
    thread = threading.Thread(target=web.run, kwargs={"sockets": [where]})
    thread.start()
    while not web.started:
        time.sleep(0.01)
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page()
        tab.set_default_timeout(90_000)
        tab.goto(f"http://127.0.0.1:{where.getsockname()[1]}/page")
        yield tab, engine
        browser.close()
    web.should_exit = True
    thread.join()
    engine.close()


def test_texts_are_spoken_and_compared_in_a_browser(page):
    tab, engine = page
    expected = engine.say(Line("the quick brown fox"), 7)
    tab.get_by_label("Seed").first.fill("7")
    tab.get_by_role("textbox", name="Text").first.fill("the quick brown fox")
    tab.get_by_role("button", name="Speak", exact=True).click()
    codes = " ".join(map(str, expected.codes))
    tab.wait_for_function(
        "codes => [...document.querySelectorAll('textarea')].some(t => t.value == codes)",
        arg=codes,
    )
    tab.get_by_role("textbox", name="Text").first.fill("  ")
    tab.get_by_role("button", name="Speak", exact=True).click()
    tab.get_by_text("has no text").first.wait_for()
    tab.get_by_role("tab", name="Compare").click()
    tab.locator("textarea:visible").first.fill("dog")
    tab.get_by_role("button", name="Speak both").click()
    tab.get_by_text("Which is better?").wait_for()
    tab.get_by_role("button", name="No difference").click()
    tab.get_by_text("no difference: 1").wait_for()
    tab.get_by_role("tab", name="Runs").click()
    tab.get_by_text("Step 3, 1 samples.").wait_for()
    tab.get_by_label("Sample", exact=True).click()
    tab.get_by_role("option", name="000003_0.wav").click()
    tab.get_by_text("0:00").last.wait_for()
    tab.get_by_label("Evaluation").click()
    tab.get_by_role("option", name="score").click()
    tab.frame_locator("iframe").get_by_text("WER 3%").wait_for()
    if shown := os.environ.get("SCREENSHOTS"):
        tab.set_viewport_size({"width": 1000, "height": 1150})
        tab.screenshot(path=f"{shown}/page_runs.png")
