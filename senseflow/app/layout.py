"""The parts of the page, from top to bottom, and its theme; `page.css` has its few rules."""

from dataclasses import dataclass

import gradio as gr

from senseflow.app import words
from senseflow.app.studio import STUDENT, TEACHER, Studio
from senseflow.sampling.drawing import CPS, SAMPLERS

MOST_LETTERS = 4000  # of a prompt
ETA = 0.7  # what the page begins with where rewards trained none: neither of the other samplers
SMALL = 256  # pixels: images up to this size are shown with their pixels


@dataclass(frozen=True)
class Settings:
    """What a reader of the page chooses."""

    seed: gr.Number
    new_seed: gr.Button
    height: gr.Number
    width: gr.Number
    steps: gr.Radio
    sampler: gr.Radio
    eta: gr.Number  # of cps
    with_teacher: gr.Checkbox
    teacher_steps: gr.Number
    guidance: gr.Number


@dataclass(frozen=True)
class Parts:
    """All that the buttons read or change."""

    prompt: gr.Textbox
    draw: gr.Button
    stop: gr.Button
    said: gr.HTML  # progress, errors, times
    pictures: dict[str, gr.Image]  # by STUDENT and TEACHER
    captions: dict[str, gr.HTML]
    teacher_column: gr.Column
    settings: Settings
    earlier: gr.State  # the entries of the gallery
    gallery: gr.Gallery


def lay_out(studio: Studio, prompt: str) -> Parts:
    """Make the parts, inside of the gr.Blocks that is open."""
    gr.HTML(words.heading(studio), elem_id="heading")
    with gr.Row(equal_height=True):
        text = gr.Textbox(
            prompt, label="Prompt", placeholder="What to draw", autofocus=True, scale=6,
            max_length=MOST_LETTERS, elem_id="prompt", min_width=260,
        )  # fmt: skip
        with gr.Column(scale=1, min_width=130, elem_id="buttons"):
            draw = gr.Button("Draw", variant="primary", elem_id="draw", min_width=90)
            stop = gr.Button("Stop", elem_id="stop", min_width=90)
    said = gr.HTML(words.note("Type a prompt and press Draw."), elem_id="said")
    pictures, captions, columns = {}, {}, {}
    with gr.Row(elem_id="pair"):
        for side in (STUDENT, TEACHER):
            visible = side == STUDENT or studio.has_teacher
            with gr.Column(min_width=150, visible=visible) as columns[side]:
                pictures[side] = _picture(side, studio)
                captions[side] = gr.HTML(words.named(side), elem_id=f"{side}-caption")
    settings = _settings(studio)
    gallery = gr.Gallery(  # hidden until there is something in it
        label="Earlier images: click one to restore its settings", columns=6,
        height="auto", allow_preview=False, object_fit="contain", format="png", interactive=False,
        buttons=[], visible=False, elem_id="earlier",
    )  # fmt: skip
    return Parts(
        text, draw, stop, said, pictures, captions, columns[TEACHER], settings, gr.State([]),
        gallery,
    )  # fmt: skip


def _picture(side: str, studio: Studio) -> gr.Image:
    """PNG: what is downloaded has the pixels that the scripts save."""
    small = max(studio.default.height, studio.default.width) <= SMALL
    return gr.Image(
        label=side.capitalize(), show_label=False, format="png", type="pil", interactive=False,
        buttons=["download", "fullscreen"], alt_text=f"the {side}'s image", elem_id=side,
        elem_classes=["picture", "pixels"] if small else ["picture"],
    )  # fmt: skip


def _settings(studio: Studio) -> Settings:
    with gr.Row(elem_id="settings"):
        with gr.Column(min_width=220), gr.Group(elem_classes="card"):
            with gr.Row():
                seed = _number("Seed", 0)
                new_seed = gr.Button("New seed", min_width=90, elem_id="new-seed")
            with gr.Row():
                height = _number("Height", studio.default.height, studio.student.size_multiple)
                width = _number("Width", studio.default.width, studio.student.size_multiple)
        with gr.Column(min_width=220), gr.Group(elem_classes="card"):
            possible = studio.family.levels.possible_steps(studio.student.anchors)
            steps = gr.Radio(
                possible, value=studio.default.steps, label="Student's steps", elem_id="steps"
            )
            sampler = gr.Radio(
                list(SAMPLERS), value=studio.default.sampler, label="Student's sampler",
                elem_id="sampler",
            )  # fmt: skip
            begin = studio.default.eta or ETA
            eta = _number("Eta", begin, 0.1, whole=False, visible=studio.default.sampler == CPS)
        with gr.Column(min_width=220, visible=studio.has_teacher), gr.Group(elem_classes="card"):
            with_teacher = gr.Checkbox(
                studio.has_teacher, label="Teacher beside it", elem_id="with-teacher"
            )
            with gr.Row():
                teacher_steps = _number("Teacher's steps", studio.family.teacher_steps)
                scale = studio.teacher_guidance
                guidance = _number("Guidance", scale, 0.5, whole=False, visible=scale is not None)
    return Settings(
        seed, new_seed, height, width, steps, sampler, eta, with_teacher, teacher_steps, guidance
    )


def _number(
    label: str, value: float | None, step: float = 1, whole: bool = True, visible: bool = True
) -> gr.Number:
    name = label.lower().replace("'s ", "-")
    precision = 0 if whole else None
    return gr.Number(
        value, label=label, precision=precision, step=step, min_width=90, elem_id=name,
        visible=visible,
    )  # fmt: skip


def theme() -> gr.themes.Base:
    """System fonts: the page asks nothing of any other server."""
    return gr.themes.Default(
        primary_hue="blue",
        neutral_hue="slate",
        font=("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"),
        font_mono=("ui-monospace", "SFMono-Regular", "Menlo", "monospace"),
    )
