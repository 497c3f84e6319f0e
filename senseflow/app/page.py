"""What the buttons of the page do, and serving it."""

import logging
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
import torch
from PIL import Image

from senseflow.app import words
from senseflow.app.layout import lay_out, theme
from senseflow.app.studio import STUDENT, TEACHER, Drawn, Stopped, Stops, Studio, Wanted
from senseflow.sampling.drawing import CPS, Drawing
from senseflow.teachers.family import Plan

logger = logging.getLogger(__name__)

MOST_EARLIER = 24  # images kept on the page
MOST_SESSIONS = 100  # whose earlier images are kept
CACHE_S = 86400  # image files on the disk are kept so long, and looked through so often
PROGRESS = gr.Progress()

Values = dict[Any, Any]  # by part of the page


class Earlier(NamedTuple):
    """One entry of the history: its small picture, and what was asked of the student."""

    picture: Image.Image
    wanted: Wanted


class Page:
    """The parts of the page and what they do; `blocks` is what gradio serves."""

    def __init__(self, studio: Studio, prompt: str = "") -> None:
        self.studio = studio
        self.stops = Stops()
        title = f"A student of {studio.family.title}"
        with gr.Blocks(
            title=title, analytics_enabled=False, delete_cache=(CACHE_S, CACHE_S)
        ) as blocks:
            self.parts = lay_out(studio, prompt)
            self._connect_drawing(blocks)
            self._connect_settings()
        self.blocks = blocks.queue(default_concurrency_limit=1)

    def launch(
        self, host: str, port: int | None = None, share: bool = False
    ) -> tuple[str, str | None]:
        """Serve in threads of its own; the address here, and that of gradio's servers."""
        _, address, public = self.blocks.launch(
            server_name=host,
            server_port=port,
            share=share,
            prevent_thread_lock=True,
            quiet=True,
            show_error=True,
            state_session_capacity=MOST_SESSIONS,
            run_history=False,
            footer_links=["settings", "api"],
            theme=theme(),
            css_paths=Path(__file__).with_name("page.css"),
        )
        return address, public

    def close(self) -> None:
        """End what is being drawn, and the server."""
        self.stops.stop_all()
        self.blocks.close(verbose=False)

    def _connect_drawing(self, blocks: gr.Blocks) -> None:
        parts, chosen = self.parts, self.parts.settings
        asked = {parts.prompt, *vars(chosen).values()} - {chosen.new_seed}
        shown = [*parts.pictures.values(), *parts.captions.values()]
        drawing = gr.on(
            [parts.draw.click, parts.prompt.submit],
            self.draw,
            inputs={*asked, parts.earlier},
            outputs=[parts.said, *shown, parts.earlier, parts.gallery],
            show_progress_on=parts.said,
            api_name="draw",
        )
        parts.stop.click(
            self._stop, None, parts.said, cancels=[drawing], queue=False, api_visibility="private"
        )
        blocks.unload(self._left)

    def _connect_settings(self) -> None:
        parts, chosen = self.parts, self.parts.settings
        at_once: dict[str, Any] = dict(
            queue=False, show_progress="hidden", api_visibility="private"
        )
        chosen.new_seed.click(lambda: random.randrange(2**31), None, chosen.seed, **at_once)
        chosen.with_teacher.change(
            lambda on: [gr.update(visible=on), *[gr.update(interactive=on)] * 2],
            chosen.with_teacher,
            [parts.teacher_column, chosen.teacher_steps, chosen.guidance],
            **at_once,
        )
        chosen.sampler.change(
            lambda sampler: gr.update(visible=sampler == CPS), chosen.sampler, chosen.eta, **at_once
        )
        restored = [parts.prompt, chosen.seed, chosen.steps, chosen.sampler, chosen.eta]
        restored += [chosen.height, chosen.width]
        parts.gallery.select(self._take_back, parts.earlier, restored, **at_once)

    def draw(
        self, values: Values, request: gr.Request, progress: gr.Progress = PROGRESS
    ) -> Iterator[Values]:
        """The student's image, then the teacher's: what changes on the page, when it is known.

        What cannot be drawn is said on the page.
        """
        said, drawn = self.parts.said, {}
        try:
            with self.stops.drawing(request.session_hash) as stop:
                plans = self._plans(values)
                yield {said: ""}
                for side, wanted, plan in plans:
                    drawn[side] = self._draw_one(side, wanted, plan, stop, progress)
                    yield self._shows(side, drawn[side])
                yield {said: words.summary(drawn), **self._remembers(drawn, values)}
        except Stopped:
            yield {said: words.note("Stopped.")}
        except ValueError as error:
            yield {said: words.problem(str(error))}
        except torch.OutOfMemoryError:
            yield {said: words.problem(words.NO_MEMORY)}

    def _plans(self, values: Values) -> list[tuple[str, Wanted, Plan]]:
        """What is to be drawn, the student first; raises ValueError if either cannot."""
        chosen = self.parts.settings
        for part in (chosen.seed, chosen.height, chosen.width):
            _check_filled(part, values)
        size = dict(height=values[chosen.height], width=values[chosen.width])
        prompt, seed = values[self.parts.prompt], values[chosen.seed]
        steps, sampler = values[chosen.steps], values[chosen.sampler]
        if sampler == CPS:
            _check_filled(chosen.eta, values)
        eta = values[chosen.eta] if sampler == CPS else None
        wanted = Wanted(prompt, Drawing(steps=steps, sampler=sampler, eta=eta, seed=seed, **size))
        plans = [(STUDENT, wanted, self.studio.plan(STUDENT, wanted))]
        if values[chosen.with_teacher] and self.studio.has_teacher:
            _check_filled(chosen.teacher_steps, values)
            if self.studio.teacher_guidance is not None:
                _check_filled(chosen.guidance, values)
            steps, guidance = values[chosen.teacher_steps], values[chosen.guidance]
            try:
                drawing = Drawing(steps=steps, guidance=guidance, seed=seed, **size)
                wanted = Wanted(prompt, drawing)
                plans.append((TEACHER, wanted, self.studio.plan(TEACHER, wanted)))
            except ValueError as error:
                raise ValueError(f"teacher's {error}") from error
        return plans

    def _draw_one(
        self, side: str, wanted: Wanted, plan: Plan, stop: threading.Event, progress: gr.Progress
    ) -> Drawn:
        def on_step(num: int) -> None:
            if stop.is_set():
                raise Stopped
            progress((num, plan.steps), desc=side, unit=f"steps of the {side}")

        on_step(0)
        return self.studio.draw(side, wanted, plan, on_step)

    def _shows(self, side: str, drawn: Drawn) -> Values:
        """One image and its caption; beside the student's an older teacher's image goes."""
        parts = self.parts
        caption = words.caption(side, drawn, self.studio.family.levels.name)
        shown: Values = {parts.pictures[side]: drawn.image, parts.captions[side]: caption}
        if side == STUDENT:
            shown |= {parts.pictures[TEACHER]: None, parts.captions[TEACHER]: words.named(TEACHER)}
        return shown

    def _remembers(self, drawn: dict[str, Drawn], values: Values) -> Values:
        """The history with what was drawn in front."""
        entry = Earlier(words.thumbnail(drawn), drawn[STUDENT].wanted)
        earlier = [entry, *values[self.parts.earlier]][:MOST_EARLIER]
        pictures = [(one.picture, words.remembered(one.wanted)) for one in earlier]
        shown = gr.update(value=pictures, visible=True, selected_index=None)
        return {self.parts.earlier: earlier, self.parts.gallery: shown}

    def _take_back(self, earlier: list[Earlier], chosen: gr.SelectData) -> list[Any]:
        """Prompt, seed, steps, sampler, eta, height and width of an entry of the history."""
        prompt, drawing = earlier[chosen.index].wanted
        eta = gr.skip() if drawing.eta is None else drawing.eta  # without cps it stays as it is
        kept = [prompt, drawing.seed, drawing.steps, drawing.sampler, eta]
        return [*kept, drawing.height, drawing.width]

    def _stop(self, request: gr.Request) -> str:
        self.stops.stop(request.session_hash)
        return words.note("Stopped.")

    def _left(self, request: gr.Request) -> None:
        """Nobody waits for the image of a tab that was closed or loaded anew."""
        self.stops.stop(request.session_hash)


def _check_filled(part: gr.Number, values: Values) -> None:
    if values[part] is None:
        raise ValueError(f"{part.label} is empty: type a number")


def serve(studio: Studio, prompt: str, host: str, port: int, share: bool) -> None:
    """Show the page until KeyboardInterrupt; raises OSError when it cannot listen there."""
    page = Page(studio, prompt)
    address, public = page.launch(host, port, share)
    logger.info("the page is at %s  (Ctrl-C ends it)", address)
    if public:
        logger.info("and, for everybody who has this address, at %s", public)
    try:
        threading.Event().wait()
    finally:
        page.close()
