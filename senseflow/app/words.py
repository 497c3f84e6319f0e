"""What the page says of students and images, and the thumbnails of its history."""

from markupsafe import Markup
from PIL import Image

from senseflow.app.studio import STUDENT, TEACHER, Drawn, Studio, Wanted
from senseflow.sampling import cut

BOLD = Markup("{}<b>{}</b>{}")  # what Markup's format is given is escaped
FACT = Markup("<span>{}</span>")
THUMB_SIDE = 192  # pixels of a thumbnail's height
THUMB_GAP = 4
PROMPT_LETTERS = 40  # of a caption in the history
NO_MEMORY = (
    "out of GPU memory: choose a smaller size, or start the page with --offload or --student_only"
)


def heading(studio: Studio) -> Markup:
    """Whose student this is, from which iteration, and on what it runs."""
    model, family = studio.student, studio.family
    assert model.student
    card, name = model.card, model.student.files.weights.parent.resolve()
    said: list[str] = [BOLD.format("student ", "/".join(name.parts[-3:]), "")]
    if card and card.iteration:
        said.append(f"iteration {card.iteration:,}")
    if model.paths.ema:
        said.append("averaged weights")
    if studio.has_teacher:
        said.append(BOLD.format("teacher ", model.paths.base.resolve().name, ""))
    said.append(f"{studio.pipeline.device}, {str(studio.pipeline.dtype).removeprefix('torch.')}")
    title = f"A {len(model.anchors)}-step student of {family.title}"
    return Markup("<h1>{}</h1>").format(title) + facts(said)


def facts(said: list[str]) -> Markup:
    """Small facts in a row."""
    return Markup("<p class='facts'>{}</p>").format(Markup().join(map(FACT.format, said)))


def caption(side: str, drawn: Drawn, levels: str) -> Markup:
    """The time in front, then all that the image depends on.

    levels: what the family calls its noise levels.
    """
    plan = drawn.plan
    said = [f"{plan.steps} step{'s' * (plan.steps > 1)}", f"sampler {plan.sampler}"]
    if plan.eta is not None:
        said.append(f"eta {plan.eta:g}")
    if plan.guidance is not None:
        said.append(f"guidance {plan.guidance:g}")
    said += [f"seed {drawn.wanted.drawing.seed}", f"{plan.height} × {plan.width}"]
    if side == STUDENT:
        said.append(f"{levels} {', '.join(f'{level:.4g}' for level in drawn.levels)}")
    if drawn.cut:
        said.append(f"prompt cut: {cut.said(drawn.cut)}")
    first = Markup(" <small>first image, with warm-up</small>") if drawn.first else ""
    return named(side, seconds(drawn.time_s) + first) + facts(said)


def named(side: str, time: str = "") -> Markup:
    """The first line under an image: whose it is, and its time."""
    return Markup("<p class='time'><span>{}</span> {}</p>").format(side.capitalize(), time)


def remembered(wanted: Wanted) -> str:
    """Under a picture of the history; plain text."""
    prompt, drawing = " ".join(wanted.prompt.split()), wanted.drawing
    short = prompt if len(prompt) <= PROMPT_LETTERS else prompt[: PROMPT_LETTERS - 1] + "…"
    eta = "" if drawing.eta is None else f" {drawing.eta:g}"
    return f"{short} · seed {drawing.seed} · {drawing.steps} {drawing.sampler}{eta}"


def summary(drawn: dict[str, Drawn]) -> Markup:
    """The line under the button when all is drawn."""
    if TEACHER not in drawn:
        return note(f"Drawn in {seconds(drawn[STUDENT].time_s)}.")
    student, teacher = drawn[STUDENT], drawn[TEACHER]
    times = f"{seconds(student.time_s)} and {seconds(teacher.time_s)}"
    if student.first or teacher.first:
        return note(f"Drawn in {times}; the next images tell the speed.")
    ratio = teacher.time_s / student.time_s
    if ratio < 1:
        return note(f"Drawn in {times}: the student took {1 / ratio:.1f} times as long.")
    return note(
        BOLD.format(f"Drawn in {times}: the student is ", f"{ratio:.1f} times", " as fast.")
    )


def problem(text: str) -> Markup:
    """An error, without the dashes of the flag that it begins with."""
    text = " ".join(text.split()).removeprefix("--")
    said = text[:1].upper() + text[1:]
    return Markup("<p class='problem' role='alert'>{}</p>").format(said)


def note(text: str) -> Markup:
    """A plain line under the button."""
    return Markup("<p>{}</p>").format(text)


def seconds(time_s: float) -> str:
    """Three digits, or whole seconds."""
    return f"{time_s:.0f} s" if time_s >= 100 else f"{time_s:.3g} s"


def thumbnail(drawn: dict[str, Drawn]) -> Image.Image:
    """Student and teacher side by side, small."""
    images = [_resized(d.image) for _, d in sorted(drawn.items())]
    width = sum(image.width for image in images) + THUMB_GAP * (len(images) - 1)
    pair = Image.new("RGBA", (width, THUMB_SIDE))
    left = 0
    for image in images:
        pair.paste(image, (left, 0))
        left += image.width + THUMB_GAP
    return pair


def _resized(image: Image.Image) -> Image.Image:
    width = max(1, round(image.width * THUMB_SIDE / image.height))
    smaller = image.height > THUMB_SIDE
    kind = Image.Resampling.LANCZOS if smaller else Image.Resampling.NEAREST
    return image.convert("RGB").resize((width, THUMB_SIDE), kind)
