"""The runs below a folder, for the page: their numbers, samples and evaluations."""

import html
import json
from pathlib import Path

import gradio as gr
import numpy as np
import pandas as pd

from llasa_jax.errors import UserError
from llasa_jax.evaluate.evaluation import PAGE, RESULTS
from llasa_jax.speech.audio import SAMPLE_RATE, read_audio

NUMBERS, SAMPLES = "metrics.jsonl", "samples"
SECONDS_BETWEEN_LOOKS = 10
MOST_POINTS = 2000  # of a curve
NEWEST = "the newest"


def runs_below(folder: Path) -> dict[str, Path]:
    """Folders with numbers, by their names below `folder`, the latest first."""
    files = sorted(folder.glob(f"**/{NUMBERS}"), key=lambda path: -path.stat().st_mtime)
    return {str(path.parent.relative_to(folder)): path.parent for path in files}


def evaluations_below(folder: Path) -> dict[str, Path]:
    """Pages of finished evaluations, by their names below `folder`."""
    pages = (path.with_name(PAGE) for path in folder.glob(f"**/{RESULTS}"))
    return {str(page.parent.relative_to(folder)): page for page in pages if page.is_file()}


def numbers_of(run: Path) -> pd.DataFrame:
    """The numbers of a run, a row for each line; a line that is not whole yet is left out."""
    lines = []
    for line in (run / NUMBERS).read_text(errors="replace").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    table = pd.DataFrame(lines)
    return table.select_dtypes("number")


def samples_of(run: Path) -> dict[str, Path]:
    """The speech of a run while it is trained, by name, the newest first."""
    return {path.name: path for path in sorted((run / SAMPLES).glob("*.wav"), reverse=True)}


def curve_of(table: pd.DataFrame, name: str) -> pd.DataFrame:
    """The steps and values of one number, at most `MOST_POINTS` of them."""
    if name not in table:
        return pd.DataFrame({"step": [], "value": []})
    points = table[["step", name]].dropna().rename(columns={name: "value"})
    return points.iloc[:: -(-len(points) // MOST_POINTS) or 1]


def add_tab(folder: Path) -> None:
    """The tab of runs, within `gradio.Blocks`. It looks again every ten seconds."""
    with gr.Tab("Runs"):
        with gr.Row():
            run = gr.Dropdown([], label="Run", allow_custom_value=True)
            number = gr.Dropdown([], label="Number", value="loss", allow_custom_value=True)
        about = gr.Markdown()
        plot = gr.LinePlot(x="step", y="value", title="By step")
        with gr.Row():
            sample = gr.Dropdown([NEWEST], label="Sample", allow_custom_value=True)
            sound = gr.Audio(label="Speech of the sample", buttons=["download"])
            played = gr.State("")
        evaluation = gr.Dropdown([], label="Evaluation", allow_custom_value=True)
        page = gr.HTML()

        def look(run_name, number_name, sample_name, evaluation_name, before):
            runs, pages = runs_below(folder), evaluations_below(folder)
            run_name = run_name if run_name in runs else next(iter(runs), None)
            table = numbers_of(runs[run_name]) if run_name else pd.DataFrame({"step": []})
            names = [name for name in table.columns if name != "step"]
            number_name = number_name if number_name in names else next(iter(names), None)
            samples = samples_of(runs[run_name]) if run_name else {}
            if sample_name not in samples:
                sample_name = NEWEST
            chosen = samples.get(sample_name) or next(iter(samples.values()), None)
            # Only another sample is put in the player's place: this one may be playing.
            clip = gr.skip() if str(chosen) == before else _sound(chosen)
            last = int(table["step"].max()) if len(table) else 0
            text = f"Step {last:,}, {len(samples)} samples." if run_name else "There are no runs."
            return (
                gr.Dropdown(list(runs), value=run_name),
                gr.Dropdown(names, value=number_name),
                text,
                curve_of(table, number_name or ""),
                gr.Dropdown([NEWEST, *samples], value=sample_name),
                clip,
                "" if clip is None else str(chosen),
                gr.Dropdown(
                    list(pages), value=evaluation_name if evaluation_name in pages else None
                ),
            )

        def read(evaluation_name):
            found = evaluations_below(folder).get(evaluation_name)
            if found is None:
                return ""
            content = html.escape(found.read_text(errors="replace"))
            return f'<iframe sandbox srcdoc="{content}" style="width:100%;height:900px"></iframe>'

        asked = [run, number, sample, evaluation, played]
        shown = [run, number, about, plot, sample, sound, played, evaluation]
        looks = gr.Timer(SECONDS_BETWEEN_LOOKS).tick
        for changed in (run.input, number.input, sample.input, looks):
            changed(look, asked, shown, api_visibility="private", show_progress="hidden")
        evaluation.input(read, evaluation, page, api_visibility="private")


def _sound(path: Path | None) -> tuple[int, np.ndarray] | None:
    if path is None:
        return None
    try:
        wave = read_audio(path)
    except UserError:  # it is being written
        return None
    return SAMPLE_RATE, np.round(np.clip(wave, -1, 1) * 32_767).astype(np.int16)
