"""The page's tab that makes a dataset from a folder and trains on it."""

import html
from collections.abc import Callable

import gradio as gr
import pandas as pd

from llasa_jax.errors import UserError
from llasa_jax.runtime.files import sentence_of
from llasa_jax.serve.runs import NUMBERS, curve_of, numbers_of
from llasa_jax.serve.work import LAYOUTS, SERVED, Job, Plan, Work

SECONDS_BETWEEN_LOOKS = 3
FINDINGS = ["severity", "check", "message", "fix"]


def add_tab(page: gr.Blocks, work: Work) -> None:
    """The tab, within `gradio.Blocks`. It looks again every three seconds; what was started goes on
    when nobody looks.
    """
    with gr.Tab("Train"):
        gr.Markdown("### A dataset from a folder")
        with gr.Row():
            folder = gr.Dropdown([], label="Folder of audio", allow_custom_value=True)
            layout = gr.Dropdown([*LAYOUTS], label="What is in it")
            made = gr.Textbox(label="Name of the dataset")
            share = gr.Number(0.02, label="Share for validation", minimum=0, maximum=0.99)
        with gr.Row():
            make = gr.Button("Make the dataset", variant="primary")
            stop_making = gr.Button("Stop making it")
        making = gr.Markdown()
        findings = gr.Dataframe(
            headers=FINDINGS,
            label="What the doctor says",
            wrap=True,
            column_widths=["10%", "10%", "50%", "30%"],
        )
        with gr.Accordion("Report", open=False):
            report = gr.HTML()
        gr.Markdown("### A training\nWhat is 0 or empty is as the recipe or the default has it.")
        with gr.Row():
            dataset = gr.Dropdown([], label="Dataset", allow_custom_value=True)
            model = gr.Dropdown([SERVED], label="Begin with", allow_custom_value=True)
            recipe = gr.Dropdown([""], value="", label="Recipe", allow_custom_value=True)
            run = gr.Textbox(label="Name of the run")
        with gr.Row():
            steps = _number("Steps")
            rows = _number("Rows per step")
            rate = gr.Number(None, label="Learning rate", minimum=0)
            rank = _number("LoRA rank")
            every = _number("Steps between checkpoints")
        sample = gr.Textbox(label="A text to speak at each checkpoint")
        with gr.Row():
            start = gr.Button("Start or go on", variant="primary")
            stop = gr.Button("Save and stop")
        training = gr.Markdown()
        plot = gr.LinePlot(x="step", y="value", title="Loss by step")

        chosen = [folder, dataset, model, recipe]

        def choices():
            found = (work.audio_folders(), work.made_datasets(), work.models())
            return [gr.Dropdown(names) for names in (*found, ["", *work.recipes()])]

        def look():
            making, training = (_about(job, work) for job in (work.making, work.training))
            return [making, *_made(work), training, _curve(work)]

        shown = [making, findings, report, training, plot]

        def make_dataset(folder, layout, name, share):
            work.make_dataset(name.strip(), folder or "", layout, share or 0.0)

        def train(name, dataset, model, recipe, steps, rows, rate, rank, every, sample):
            work.train(
                Plan(
                    name.strip(),
                    dataset or "",
                    model or SERVED,
                    recipe or "",
                    steps=steps or 0,
                    rows=rows or 0,
                    learning_rate=rate or 0.0,
                    lora_rank=rank or 0,
                    every=every or 0,
                    sample=sample,
                )
            )

        def end(job: Job | None) -> None:
            if job:
                job.stop()

        plan = [run, dataset, model, recipe, steps, rows, rate, rank, every, sample]
        for button, action, asked in (
            (make, make_dataset, [folder, layout, made, share]),
            (start, train, plan),
            (stop_making, lambda: end(work.making), []),
            (stop, lambda: end(work.training), []),
        ):
            button.click(_plainly(action), asked, None, api_visibility="private").success(
                look, None, shown, api_visibility="private", show_progress="hidden"
            )
        page.load(choices, None, chosen, api_visibility="private", show_progress="hidden")
        # What has ended may be chosen from then on.
        making.change(choices, None, chosen, api_visibility="private", show_progress="hidden")
        gr.Timer(SECONDS_BETWEEN_LOOKS).tick(
            look, None, shown, api_visibility="private", show_progress="hidden"
        )


def _number(label: str) -> gr.Number:
    return gr.Number(None, label=label, minimum=0, precision=0)


def _plainly(action: Callable) -> Callable:
    """`action`, whose errors of the user are one sentence on the page."""

    def run(*asked) -> None:
        try:
            action(*asked)
        except (UserError, OSError) as error:
            raise gr.Error(sentence_of(error), print_exception=False) from None

    return run


def _about(job: Job | None, work: Work) -> str:
    if job is None:
        return "Nothing was started yet."
    log, notice = (html.escape(_relative(text, work)) for text in (job.log(), job.notice))
    notice = f"{notice}\n\n" if notice else ""
    return f"**{job.name}: {job.state}**\n\n{notice}<pre>{log}</pre>"


def _made(work: Work) -> tuple[pd.DataFrame, str]:
    """The doctor's findings on the dataset that was made last, and its report."""
    name = work.making.name if work.making else ""
    found = pd.DataFrame(work.findings(name) if name else [], columns=FINDINGS)
    found["message"] = [_relative(message, work) for message in found["message"]]
    page = html.escape(work.report(name)) if name else ""
    frame = f'<iframe sandbox srcdoc="{page}" style="width:100%;height:900px"></iframe>'
    return found, frame if page else ""


def _relative(text: str, work: Work) -> str:
    """A text with paths as the page names them."""
    return text.replace(f"{work.root}/", "")


def _curve(work: Work) -> pd.DataFrame:
    run = work.runs / (work.training.name if work.training else "")
    if not (work.training and (run / NUMBERS).is_file()):
        return pd.DataFrame({"step": [], "value": []})
    return curve_of(numbers_of(run), "loss")
