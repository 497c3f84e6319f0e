"""The look of the page: a theme without fonts of other servers, and a few rules."""

import gradio as gr

SMALL = 256  # pixels: images up to this size are shown with their pixels

CSS = """
:root { --quiet: #5b6776; }
.dark { --quiet: #a3b0c2; }
.gradio-container { max-width: 1060px !important; margin: 0 auto !important; }
.gradio-container .facts { display: flex; flex-wrap: wrap; gap: .1rem .9rem; margin: 0;
  font-size: .85rem; line-height: 1.5; color: var(--quiet);
  overflow-wrap: anywhere; }
.gradio-container .facts span { color: inherit; }
.gradio-container .facts b { font-weight: 600; color: var(--body-text-color); }
#heading h1 { font-size: 1.5rem; line-height: 1.25; margin: .4rem 0 .25rem; }
#heading .html-container, #said .html-container, #pair .html-container { padding: 0 .2rem; }
@media (max-width: 640px) {
  #buttons { flex-flow: row nowrap !important; }
  #buttons button { flex: 1; width: auto; }
  .gradio-container .time { flex-direction: column; }
}

#said { min-height: 3.4rem; display: flex; align-items: center; overflow: visible !important; }
#said p { margin: 0; }
#said .html-container { width: 100%; }
#said .pending { visibility: hidden; }
#said .wrap { flex-direction: column; align-items: stretch; justify-content: center; gap: .3rem;
  background: none; }
#said .progress-text { position: static; transform: none; padding: 0; align-self: flex-start;
  font: .9rem/1.4 var(--font); font-variant-numeric: tabular-nums; }
#said .progress-level { align-items: stretch; }
#said .progress-level-inner, #said .eta-bar { display: none; }
#said .progress-bar-wrap { width: 100%; height: 6px; border-radius: 3px; overflow: hidden; }
.gradio-container .problem { padding: .55rem .9rem; border-radius: 8px; color: #8a2b12;
  background: #fdeee6; border: 1px solid #e7a98d; overflow-wrap: anywhere; }
.gradio-container.dark .problem, .dark .gradio-container .problem { color: #ffc9b2;
  background: #3a1f15; border-color: #8c4a30; }

#pair > .column { gap: .5rem; }
.picture { aspect-ratio: 1; }
.picture .image-container, .picture .image-container button, .picture .image-frame {
  width: 100%; height: 100%; }
.picture .image-frame img { width: 100%; height: 100%; object-fit: contain; }
.pixels img { image-rendering: pixelated; }
.gradio-container .time { display: flex; flex-wrap: wrap; align-items: baseline; gap: 0 .5rem;
  margin: 0; font-size: 1.25rem; line-height: 1.4; font-weight: 600; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
.gradio-container .time span { font-weight: 400; color: var(--quiet); }
.gradio-container .time small { font-size: .8rem; font-weight: 400; white-space: normal;
  color: var(--quiet); }

#settings { align-items: stretch; }
#settings .row:has(#new-seed) { background: var(--block-background-fill); }
#new-seed { align-self: flex-end; height: 2.6rem; margin: 0 .75rem .75rem 0;
  border-radius: var(--button-large-radius) !important; }
.card { background: var(--block-background-fill); height: 100%; }

#earlier .grid-wrap { max-height: none; min-height: 0; padding-top: 1.9rem; }
#earlier .grid-container { padding-top: 0;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 140px), 1fr)); }
#earlier .thumbnail-item { aspect-ratio: auto; height: auto; border: 0; background: none;
  box-shadow: none; overflow: visible; }
#earlier .thumbnail-item img { width: 100%; height: auto; border-radius: 4px; }
#earlier .caption-label { position: static; max-width: 100%; padding: .2rem 0 0; border: 0;
  background: none; font-size: .75rem; line-height: 1.3; white-space: normal; text-align: left;
  color: var(--quiet); }
"""


def theme() -> gr.themes.Base:
    """System fonts: the page asks nothing of any other server."""
    return gr.themes.Default(
        primary_hue="blue",
        neutral_hue="slate",
        font=("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"),
        font_mono=("ui-monospace", "SFMono-Regular", "Menlo", "monospace"),
    )
