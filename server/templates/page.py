"""What every page of Umbel shares: its look on screen, phone and paper, and nothing that is fetched."""
# ruff: noqa: E501

TEXT = r"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{% block title %}{% endblock %}</title>
<style>
:root {
  --paper: #fff; --ink: #1b2430; --muted: #566272; --line: #dfe4ea; --wash: #f5f7f9; --accent: #1f6fb2;
  --good: #1d6b45; --good-wash: #e9f5ee; --bad: #a11d1d; --bad-wash: #fdeeee;
  --s0: #1f6fb2; --s1: #c2570c; --s2: #2a7f55; --s3: #7c4bab; --s4: #b5346f; --s5: #87650f; --s6: #147d8c; --s7: #5b6675;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --paper: #12171d; --ink: #e6eaef; --muted: #9aa7b5; --line: #2c3540; --wash: #1a2129; --accent: #6db3ec;
    --good: #7fd0a3; --good-wash: #15291f; --bad: #ff9c94; --bad-wash: #341a1a;
    --s0: #6db3ec; --s1: #f0955a; --s2: #6cc497; --s3: #b99ae0; --s4: #ee86b3; --s5: #d3b158; --s6: #60c4d1; --s7: #a9b4c1;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
header { display: flex; gap: 1rem; align-items: center; border-bottom: 1px solid var(--line); padding-bottom: 1.1rem; }
header svg { width: 3.4rem; flex: none; stroke: var(--accent); fill: var(--accent); }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0; letter-spacing: -0.01em; }
header p { margin: .25rem 0 0; color: var(--muted); }
h2 { font-size: 1.25rem; margin: 3rem 0 .5rem; letter-spacing: -0.005em; }
h3 { font-size: 1rem; margin: 1.75rem 0 .4rem; }
p { margin: .5rem 0; max-width: 46rem; }
.lead { font-size: 1.1rem; margin: 1.4rem 0; }
.note, figcaption, caption, dt, summary { color: var(--muted); font-size: .9rem; }
.banner { background: var(--bad-wash); color: var(--bad); border-left: 4px solid var(--bad); border-radius: 4px; padding: .8rem 1rem; margin: 1.4rem 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem; margin: 1.5rem 0; }
.tiles div { background: var(--wash); border-radius: 8px; padding: .8rem 1rem; }
.tiles b { display: block; font-size: 1.6rem; line-height: 1.25; font-weight: 650; font-variant-numeric: tabular-nums; }
.tiles span { display: block; color: var(--muted); font-size: .85rem; line-height: 1.35; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 18.5rem), 1fr)); gap: 0 1.5rem; margin: 1rem 0; }
figure { margin: 0 0 1.25rem; break-inside: avoid; display: grid; grid-row: span 2; grid-template-rows: subgrid; gap: .3rem; }
figcaption b { color: var(--ink); }
figure svg { display: block; width: 100%; max-width: 27rem; height: auto; }
figure svg text { font-family: inherit !important; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; margin: .75rem 0; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: .4rem; }
th, td { text-align: left; padding: .38rem .9rem .38rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; color: var(--muted); font-size: .84rem; vertical-align: bottom; }
tbody th { color: var(--ink); font-size: inherit; vertical-align: top; }
.n { text-align: right; white-space: nowrap; }
td:first-child, td.name { white-space: nowrap; }
td.differs { white-space: normal; min-width: 9rem; }
td.why { min-width: 14rem; color: var(--muted); }
tr.chosen > * { background: var(--good-wash); }
tr.chosen > :first-child { box-shadow: inset 3px 0 var(--good); padding-left: .7rem; }
.tag { color: var(--good); font-size: .8rem; font-weight: 650; white-space: nowrap; }
td.bar { width: 45%; min-width: 6rem; vertical-align: middle; }
td.bar i { display: block; height: .8rem; border-radius: 2px; background: var(--s7); opacity: .55; print-color-adjust: exact; }
td.bar i.own { background: var(--accent); opacity: 1; }
dl { display: grid; grid-template-columns: minmax(8rem, max-content) 1fr; gap: .3rem 1.5rem; margin: .75rem 0; max-width: 52rem; }
dt, dd { margin: 0; }
dd { overflow-wrap: anywhere; }
code, pre { font: .88em/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; background: var(--wash); border-radius: 4px; padding: .1em .35em; overflow-wrap: anywhere; }
pre { padding: .8rem 1rem; white-space: pre-wrap; }
summary { cursor: pointer; margin: .75rem 0; }
h4 { font-size: .9rem; margin: 1.4rem 0 .3rem; text-transform: capitalize; }
td.pass { color: var(--good); } td.fail { color: var(--bad); font-weight: 650; } td.unknown { color: var(--muted); }
dd.why { color: var(--muted); }
.sign { display: flex; gap: 2rem; margin: 2.5rem 0 1rem; }
.sign p { flex: 1; border-top: 1px solid var(--muted); padding-top: .3rem; margin-top: 2.2rem; color: var(--muted); font-size: .85rem; }
.key { display: flex; flex-wrap: wrap; gap: .3rem 1.4rem; margin: .75rem 0; font-size: .9rem; }
svg.swatch { width: 1.9rem; height: .6rem; vertical-align: middle; margin-right: .45rem; }
footer { margin-top: 3.5rem; padding-top: 1rem; border-top: 1px solid var(--line); color: var(--muted); font-size: .85rem; }
@media (max-width: 34rem) {
  main { padding: 1.25rem 1rem 3rem; }
  h1 { font-size: 1.4rem; }
  dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: .5rem; }
}
@page { margin: 1.7cm 1.5cm; }
@media print {
  .tiles { grid-template-columns: repeat(4, 1fr); }
  .tiles b { font-size: 1.2rem; }
  .figures { grid-template-columns: 1fr 1fr; }
  td.differs { min-width: 0; }
  body { font-size: 10.5pt; }
  main { padding: 0; max-width: none; }
  h2, h3, caption { break-after: avoid; }
  tr, .banner, .tiles { break-inside: avoid; }
  .wide { overflow: visible; }
  details::details-content { content-visibility: visible; display: block; }
}
</style>
</head>
<body>
<main>
<header>
<svg viewBox="0 0 64 64" aria-hidden="true">
<g fill="none" stroke-width="2.4" stroke-linecap="round"><path d="M32 61V40M32 40Q26 26 9 24M32 40Q28 22 20 13M32 40V8M32 40Q36 22 44 13M32 40Q38 26 55 24"/></g>
<g stroke="none"><circle cx="8" cy="23" r="5"/><circle cx="19.5" cy="12" r="5"/><circle cx="32" cy="7.5" r="5"/><circle cx="44.5" cy="12" r="5"/><circle cx="56" cy="23" r="5"/></g>
</svg>
<div>
<h1>{{ self.title() }}</h1>
{% block subtitle %}{% endblock %}
</div>
</header>
{% block body %}{% endblock %}
<footer>Made by Umbel {{ version }}. This page is one file and fetches nothing.</footer>
</main>
</body>
</html>
"""
