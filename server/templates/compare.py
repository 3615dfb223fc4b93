"""Several runs side by side. Filled by server/compare.py."""
# ruff: noqa: E501

TEXT = r"""{% extends "page" %}
{% macro key(style) %}{% set colour, dashes = stroke(style) %}<svg class="swatch" viewBox="0 0 30 10" aria-hidden="true"><path d="M0 5H30" fill="none" style="stroke:{{ colour }}" stroke-width="3" stroke-dasharray="{{ dashes }}"/></svg>{% endmacro %}
{% macro label(group) %}{% for name, value in group.differs.items() %}<code>{{ name }}={{ value|setting }}</code>{{ " " if not loop.last }}{% else %}seeds alone{% endfor %}{% endmacro %}
{% set runs = groups|map(attribute="runs")|map("length")|sum %}

{% block title %}{{ runs }} runs side by side{% endblock %}
{% block subtitle %}
<p>{{ groups|map(attribute="runs")|map("first")|map(attribute="report.scenario")|unique|join(", ") }}{% if groups|length > 1 %} · {{ groups|length }} settings{% endif %}</p>
{% endblock %}

{% block body %}
<p class="lead">Runs that differ in nothing but their seed stand in one row, as their mean ± the sample standard deviation.</p>
{% for group in groups %}{% for run in group.runs if not run.report.privacy.guarantee and run.report.privacy.unit != "none" %}
<div class="banner"><b>{{ run.folder.name }}: the privacy guarantee does not hold:</b> {{ run.report.privacy.why_not }}</div>
{% endfor %}{% endfor %}
<div class="wide"><table>
<thead><tr><th>What differs</th><th class="n">Runs</th>{% for name in columns %}<th class="n">{{ name[0]|upper }}{{ name[1:] }}</th>{% endfor %}</tr></thead>
<tbody>
{% for group in groups %}
<tr><td class="differs">{{ key(loop.index0) }}{{ label(group) }}</td><td class="n">{{ group.runs|length }}</td>{% for of, text in columns.values() %}<td class="n">{{ cell(group.spread(of), text) }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>

<h2>By round, by bytes, by time</h2>
<p class="note">Lines are means over seeds, bands one standard deviation to each side. Training rounds only: recovery after pruning is another model.</p>
<div class="key">{% for group in groups %}<span>{{ key(loop.index0) }}{{ label(group) }}</span>{% endfor %}</div>
<div class="figures">
{% for one in drawings %}
<figure><figcaption><b>{{ one.title }}</b></figcaption>
{{ one.svg }}</figure>
{% endfor %}
</div>

<h2>Every run</h2>
<div class="wide"><table>
<thead><tr><th>Run</th><th class="n">Seed</th><th>Status</th>{% for name in columns %}<th class="n">{{ name[0]|upper }}{{ name[1:] }}</th>{% endfor %}</tr></thead>
<tbody>
{% for group in groups %}{% set outer = loop.index0 %}{% for run in group.runs %}
<tr><td>{{ key(outer) }}{{ run.folder.name }}</td><td class="n">{{ run.report.seed }}</td><td>{{ run.report.status }}</td>{% for of, text in columns.values() %}<td class="n">{{ text(of(run.report)) }}</td>{% endfor %}</tr>
{% endfor %}{% endfor %}
</tbody></table></div>
{% endblock %}
"""
