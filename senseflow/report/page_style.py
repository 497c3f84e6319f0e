"""The look of the report: one style sheet, light and dark, from 320 pixels up."""

CSS = """
:root {
  color-scheme: light dark;
  --paper: #fbfaf8; --card: #ffffff; --ink: #22262b; --soft: #5c646e; --line: #e2dfd9;
  --grid: #ebe8e2; --accent: #2a5fa5; --good: #2b6e4a; --good-paper: #e5f1ea;
  --warn: #8a4b00; --warn-paper: #fdf1de; --warn-line: #e0a852; --mark: #e9f0fa;
  --c0: #2a5fa5; --c1: #c2571a; --c2: #2b7a57; --c3: #8b3f8f; --c4: #a07a12; --c5: #3c8ea3;
  --c6: #b23a52; --c7: #6b6f78;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171a; --card: #1b1f24; --ink: #e4e7ea; --soft: #a3abb5; --line: #30363d;
    --grid: #2a2f36; --accent: #83b1ee; --good: #86cfa6; --good-paper: #1b3427;
    --warn: #f3c17a; --warn-paper: #33270f; --warn-line: #8f6a26; --mark: #20304a;
    --c0: #83b1ee; --c1: #f0995f; --c2: #7cc9a4; --c3: #d598d8; --c4: #dcbb5c; --c5: #79c6d8;
    --c6: #ef8fa1; --c7: #a9afb8;
  }
}
* { box-sizing: border-box; }
html { scroll-behavior: smooth; -webkit-text-size-adjust: 100%; }
@media (prefers-reduced-motion: reduce) { html { scroll-behavior: auto; } }
body {
  margin: 0; background: var(--paper); color: var(--ink); overflow-wrap: anywhere;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
}
main, header, nav ul, footer { max-width: 1160px; margin: 0 auto; padding: 0 20px; }
header { padding-top: 44px; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .35rem; letter-spacing: -.015em; }
h2 { font-size: 1.3rem; line-height: 1.3; margin: 0 0 .4rem; letter-spacing: -.01em; }
h3 { font-size: .95rem; margin: 1.9rem 0 .6rem; }
section { margin: 3.2rem 0 0; scroll-margin-top: 56px; }
p { margin: .4rem 0; max-width: 46rem; }
a { color: var(--accent); text-underline-offset: 2px; }
.soft, figcaption, .lead { color: var(--soft); }
.eyebrow { color: var(--soft); font-size: .85rem; margin: 0 0 .2rem; }
.pill {
  display: inline-block; padding: .12rem .7rem; border-radius: 99px; font-size: .85rem;
  font-weight: 600; background: var(--mark); color: var(--accent); margin-right: .5rem;
}
.pill.finished { background: var(--good-paper); color: var(--good); }
.pill.stopped { background: var(--warn-paper); color: var(--warn); }
.facts {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 210px), 1fr));
  gap: 1rem 1.6rem; margin: 1.6rem 0 0; padding: 1.2rem 0 0; border-top: 1px solid var(--line);
}
.facts div { min-width: 0; }
.facts dt { font-size: .8rem; color: var(--soft); }
.facts dd { margin: 0; font-variant-numeric: tabular-nums; }
.bar { height: 4px; border-radius: 2px; background: var(--line); margin-top: .35rem; }
.bar i { display: block; height: 100%; border-radius: 2px; background: var(--accent); }
nav {
  position: sticky; top: 0; z-index: 1; margin-top: 2rem; background: var(--paper);
  border-bottom: 1px solid var(--line);
}
nav ul { display: flex; gap: 1.4rem; list-style: none; overflow-x: auto; white-space: nowrap; }
nav a { display: block; padding: .7rem 0; text-decoration: none; font-size: .9rem; }
nav a:hover { text-decoration: underline; }
.notices, .signals { list-style: none; padding: 0; margin: 1rem 0 0; display: grid; gap: .6rem; }
.notices li, .signals li, .none, .notice {
  padding: .7rem 1rem; border-radius: 8px; border: 1px solid var(--line); background: var(--card);
}
.signals li { border-color: var(--warn-line); background: var(--warn-paper); }
.signals b { color: var(--warn); display: block; font-size: .9rem; }
.none { border-color: transparent; background: var(--good-paper); color: var(--good);
  max-width: none; }
details { margin-top: 1rem; }
summary { cursor: pointer; color: var(--accent); font-size: .95rem; }
.rules { margin: .8rem 0 0; }
.rules dt { font-weight: 600; margin-top: .7rem; font-size: .95rem; }
.rules dd { margin: 0; max-width: 46rem; color: var(--soft); font-size: .95rem; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr));
  gap: 14px; }
figure { margin: 0; min-width: 0; }
.panel {
  background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: .8rem .9rem .6rem; display: flex; flex-direction: column; scroll-margin-top: 64px;
}
.panel figcaption { flex: 1; }
.panel.warned { border-color: var(--warn-line); }
.panel .name { display: flex; justify-content: space-between; gap: 1rem; font-size: .92rem;
  color: var(--ink); font-weight: 600; }
.panel .now { font-weight: 400; color: var(--soft); font-variant-numeric: tabular-nums; }
.panel .about { font-size: .8rem; line-height: 1.4; margin: .1rem 0 .5rem; }
.panel .see { font-size: .8rem; color: var(--warn); }
.legend { display: flex; flex-wrap: wrap; gap: .1rem .9rem; font-size: .8rem; margin: 0 0 .4rem;
  padding: 0; list-style: none; color: var(--ink); }
.legend svg { width: 20px; height: 8px; margin-right: .35rem; vertical-align: middle; }
svg { display: block; width: 100%; height: auto; }
.legend svg { display: inline-block; }
svg text { font-size: 10.5px; fill: var(--soft); font-variant-numeric: tabular-nums; }
svg text.level { font-size: 9.5px; paint-order: stroke; stroke: var(--card); stroke-width: 3px; }
svg text.bad { fill: var(--warn); font-size: 13px; font-weight: 700; }
.grid { stroke: var(--grid); fill: none; }
path.level { stroke: var(--soft); stroke-dasharray: 4 3; fill: none; opacity: .8; }
.mark { stroke: var(--warn-line); stroke-dasharray: 2 3; fill: none; }
.curve { fill: none; stroke-width: 1.6; stroke-linejoin: round; stroke-linecap: round; }
.curve.faint { stroke-width: 1; opacity: .38; }
.c0 { stroke: var(--c0); } .c1 { stroke: var(--c1); stroke-dasharray: 7 2; }
.c2 { stroke: var(--c2); stroke-dasharray: 2 2; } .c3 { stroke: var(--c3); }
.c4 { stroke: var(--c4); stroke-dasharray: 7 2; }
.c5 { stroke: var(--c5); stroke-dasharray: 2 2; } .c6 { stroke: var(--c6); }
.c7 { stroke: var(--c7); stroke-dasharray: 7 2; }
circle { fill: var(--card); stroke-width: 1.3; stroke-dasharray: none !important; }
.band rect { fill: transparent; }
.band path { stroke: var(--soft); opacity: 0; }
.band:hover path { opacity: .7; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 8px;
  background: #fff; }
.scroll:focus-visible, a:focus-visible, summary:focus-visible {
  outline: 2px solid var(--accent); outline-offset: 2px; }
.strips { display: grid; gap: 1.6rem; margin-top: 1.2rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 520px), 1fr)); }
.strips.large { grid-template-columns: minmax(0, 1fr); }
.strips figcaption { font-size: .92rem; margin-bottom: .35rem; }
.strips figcaption b { color: var(--ink); }
.strips img { display: block; width: 100%; min-width: 540px; height: auto; }
.strips.large img { min-width: 900px; }
.samples { display: grid; gap: 14px; margin-top: 1.2rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, var(--card-width)), 1fr)); }
.sample { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: .8rem .9rem; }
.sample > figcaption { font-size: .92rem; color: var(--ink); line-height: 1.4; }
.sample > figcaption small { color: var(--soft); white-space: nowrap; }
.row { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(46%, var(--cell)), 1fr));
  gap: 10px; margin-top: .6rem; }
.row figcaption { font-size: .78rem; line-height: 1.3; margin-top: .3rem; }
.row img { display: block; width: 100%; height: auto; border-radius: 4px;
  border: 1px solid var(--line); }
img.small { image-rendering: pixelated; }
.missing { display: grid; place-items: center; aspect-ratio: 1; padding: .4rem; font-size: .78rem;
  text-align: center; border: 1px dashed var(--line); border-radius: 4px; color: var(--soft); }
.wide { overflow-x: auto; margin-top: 1rem; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums;
  overflow-wrap: normal; }
.wide table { min-width: 36rem; }
#evaluation .results-table { margin: 0; color: inherit; background: none; }
#evaluation .results-table tr > :first-child { background: var(--paper); }
#evaluation .results-table :is(th, td, dl, dt, dd) { color: inherit; border-color: var(--line); }
#evaluation .results-table .published :is(th, td) { color: var(--soft); background: var(--card); }
#evaluation .results-table dl { color: var(--soft); max-width: 46rem; }
th, td { text-align: left; padding: .4rem 1.2rem .4rem 0; vertical-align: top;
  border-bottom: 1px solid var(--line); }
thead th { color: var(--soft); font-weight: 500; font-size: .82rem; }
.config { columns: 2 420px; column-gap: 2.4rem; margin-top: 1rem; }
.config section { break-inside: avoid; margin: 0 0 1.4rem; }
.config h3 { margin: 0 0 .2rem; font-size: .92rem; }
.config dl { margin: 0; }
.config dl div { display: grid; grid-template-columns: minmax(0, 2fr) minmax(0, 3fr); gap: .8rem;
  padding: .16rem .5rem; border-radius: 4px; font-size: .88rem; line-height: 1.45; }
.config dt { color: var(--soft); }
.config dd { margin: 0; font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace;
  font-size: .84rem; }
.config .own { background: var(--mark); }
.config .own dd b { color: var(--accent); }
.config small { color: var(--soft); font-size: .78rem; display: block;
  font-family: system-ui, sans-serif; }
footer { margin-top: 4rem; padding-top: 1.2rem; padding-bottom: 3rem; color: var(--soft);
  font-size: .85rem; }
footer { border-top: 1px solid var(--line); }
@media (max-width: 560px) {
  body { font-size: 15px; }
  header { padding-top: 24px; }
  main, header, nav ul, footer { padding-left: 14px; padding-right: 14px; }
  h1 { font-size: 1.5rem; }
  .facts { grid-template-columns: 1fr 1fr; }
  .facts .long { grid-column: 1 / -1; }
}
@media print { nav { display: none; } section { break-inside: auto; } }
"""
