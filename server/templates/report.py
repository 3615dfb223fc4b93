"""One run: what was learned, how well, at what price. Filled by server/report.py."""
# ruff: noqa: E501

TEXT = r"""{% extends "page" %}
{% macro times(count, noun) %}{{ count|number }} {{ noun }}{{ "" if count == 1 else "s" }}{% endmacro %}
{% macro figure(svg, title, text) %}
<figure><figcaption><b>{{ title }}</b> {{ text }}</figcaption>
{{ svg }}</figure>
{% endmacro %}
{% set privacy, edge, fleet, final = run.privacy, run.edge, run.fleet, run.final %}

{% block title %}{{ run.scenario }}: what was learned, and at what price{% endblock %}
{% block subtitle %}
<p>{{ run.summary }}</p>
<p>{{ times(run.rounds, "round") }} · {{ times(fleet.clients, "client") }} · model {{ run.model }} with {{ times(run.parameters, "parameter") }} · seed {{ run.seed }}{% if run.status != "done" %} · <b>stopped before its last round</b>{% endif %}</p>
{% endblock %}

{% block body %}
{% if not privacy.guarantee %}
<div class="banner" role="alert"><b>{{ alarm }}:</b> {{ privacy.why_not }}</div>
{% endif %}
<p class="lead">{{ verdict }}</p>
<div class="tiles">
<div><b>{{ final.accuracy|percent }}</b><span>{% if final.accuracy is none %}{{ final.reason or "accuracy was not measured" }}{% else %}accuracy on {{ "the clients' own" if final.evaluated_by == "clients" else "held-out" }} test data{% endif %}</span></div>
<div><b>{% if privacy.worst_epsilon is none %}none{% else %}ε {{ privacy.worst_epsilon|epsilon }}{% endif %}</b><span>{% if privacy.worst_epsilon is none %}differential privacy{% else %}privacy spent by the worst client{{ "" if privacy.guarantee else " – not guaranteed" }}{% endif %}</span></div>
<div><b>{{ (run.bytes.up + run.bytes.down)|size }}</b><span>sent in all, {{ run.bytes.up|size }} of it by clients</span></div>
<div><b>{{ chosen.bytes|size if chosen else "none" }}</b><span>{% if chosen %}edge model, {{ chosen.latency_us|micros }} a prediction{% else %}edge model{% endif %}</span></div>
</div>

<h2>How well it learned</h2>
<div class="wide"><table>
<tbody>
{% for bar in bars %}
<tr><th scope="row">{{ bar.name }}</th>
{% if bar.accuracy is none %}<td colspan="2" class="why">{{ bar.reason or "not measured" }}</td>
{% else %}<td class="n">{{ bar.accuracy|percent }}</td><td class="bar"><i{{ " class=own" if loop.first }} style="width:{{ "%.2f"|format(100 * bar.accuracy) }}%"></i></td>{% endif %}</tr>
{% endfor %}
</tbody></table></div>
{% if final.evaluated_by == "clients" %}
<p class="note">{% if run.settings.get("evaluation.fraction", 1) < 1 %}{{ run.settings["evaluation.fraction"]|percent }} of the{% else %}The{% endif %} clients evaluated, each on its own test data; the mean is weighted by their test examples{% if final.worst_client_accuracy is not none %}, and the worst client reached {{ final.worst_client_accuracy|percent }}{% endif %}. These figures are not covered by differential privacy.</p>
{% elif final.worst_client_accuracy is not none %}
<p class="note">The worst client reached {{ final.worst_client_accuracy|percent }}.</p>
{% endif %}
{% if final.loss is not none %}<p class="note">Final loss {{ final.loss|number }}.{% if final.reason and final.accuracy is not none %} {{ final.reason }}{% endif %}</p>{% endif %}
{% if progress %}
<div class="figures">{% for one in progress %}{{ figure(one.svg, one.title, one.text) }}{% endfor %}</div>
{% endif %}
{% if unapplied %}<p class="note">{{ times(unapplied, "round") }} of {{ rows|length|number }} changed nothing: fewer {{ "clients were drawn" if privacy.unit == "client" else "good replies came" }} than <code>rounds.minimum</code> asks for.</p>{% endif %}

<h2>Privacy</h2>
{% if privacy.unit == "none" %}
<p>None was asked for. Updates left the clients without noise, and whoever sees them can learn about single examples. <code>--set "privacy.unit=example privacy.epsilon=8"</code> asks for a guarantee.</p>
{% else %}
<p>Differential privacy limits what {{ "a reader of the model" if privacy.unit == "client" else "anyone who sees all that left a client" }} can learn about one {{ "example" if privacy.unit in ("example", "both") else "client" }}{% if privacy.unit == "both" %}, and what a reader of the model can learn about one client{% endif %}. Whatever they believed before, the odds {{ "of what this client holds" if privacy.unit == "local" else "that it was in the data" }} change by at most a factor e<sup>ε</sup>{% if odds %}, here about {{ odds }} for the worst client{% endif %}, except with probability δ. It is a limit for the worst case, not a forecast: smaller is safer{{ "" if privacy.guarantee else ". In this run it does not hold: see the red box above" }}.</p>
<dl>
<dt>What one change is</dt><dd>{{ "one example of one client" if privacy.unit == "example" else "one whole client" }}; {{ privacy.adjacency }}</dd>
{% if privacy.against is defined and privacy.against %}<dt>Holds against</dt><dd>{{ privacy.against }}</dd>
{% endif %}<dt>Budget</dt><dd>ε {{ privacy.epsilon|epsilon }} for every client over the whole run; spent: ε {{ privacy.worst_epsilon|epsilon }} by the worst, {{ privacy.median_epsilon|epsilon }} by the median client</dd>
<dt>δ</dt><dd>{{ privacy.delta_rule }}</dd>
<dt>Clipping norm</dt><dd>{{ privacy.clip|number }}: no single {{ "example's gradient" if privacy.unit == "example" else "client's update" }} counts for more than this length</dd>
<dt>Accountant</dt><dd>{{ privacy.accountant }}</dd>
</dl>
{% endif %}
{% if privacy.not_covered %}
<h3>What {{ "nothing here protects" if privacy.unit == "none" else "this does not cover" }}</h3>
<ul>{% for text in privacy.not_covered %}<li>{{ text }}</li>{% endfor %}</ul>
{% endif %}
{% if histogram %}
<div class="figures">{{ figure(histogram, "Clients by ε spent.", "How many clients spent how much; dashed: the budget.") }}</div>
{% endif %}
{% if clients %}
<div class="wide"><table>
<caption>{{ "Every client" if clients|length == privacy.clients|length else "The %d clients that spent most"|format(clients|length) }}, highest ε first. PLD is the account that counts; RDP, a looser method, stands beside it as a check.</caption>
<thead><tr><th>Client</th><th class="n">Examples</th><th class="n">ε (PLD)</th><th class="n">ε (RDP)</th><th class="n">δ</th><th class="n">Noise<br>multiplier</th><th class="n">Sampling<br>rate</th><th class="n">Steps</th><th class="n">Rounds</th></tr></thead>
<tbody>
{% for client in clients %}
<tr><td>{{ client.name }}</td><td class="n">{{ client.examples|number }}</td><td class="n">{{ client.epsilon|epsilon }}</td><td class="n">{{ client.epsilon_rdp|epsilon }}</td><td class="n">{{ client.delta|scientific }}</td><td class="n">{{ client.noise_multiplier|fixed(3) }}</td><td class="n">{{ client.sampling_rate|fixed(4) }}</td><td class="n">{{ client.steps|number }}</td><td class="n">{{ client.rounds|number }}</td></tr>
{% endfor %}
</tbody></table></div>
{% if clients|length < privacy.clients|length %}<p class="note">{{ times(privacy.clients|length - clients|length, "more client") }} spent no more than these; <a href="{{ rows_file }}"><code>{{ rows_file }}</code></a> lists all.</p>{% endif %}
{% endif %}

{% if run.protect is defined and run.protect.who_learns is defined %}
<h2>Who can learn what of an update</h2>
<p>{{ protection }}</p>
<ul>{% for text in run.protect.who_learns %}<li>{{ text }}</li>{% endfor %}</ul>
{% endif %}

{% if run.statement is defined %}{% include "statement" %}{% endif %}

<h2>What it cost</h2>
<dl>
<dt>Bytes up</dt><dd>{{ run.bytes.up|size }} from clients to the server</dd>
<dt>Bytes down</dt><dd>{{ run.bytes.down|size }} from the server to clients</dd>
<dt>Wall clock</dt><dd>{{ run.seconds.total|duration }}: rounds {{ run.seconds.rounds|duration }}, references {{ run.seconds.references|duration }}, edge models {{ run.seconds.export|duration }}{% if evaluated is not none %}; evaluation took {{ evaluated|percent }} of it{% endif %}</dd>
<dt>Fleet</dt><dd>{{ times(fleet.clients, "client") }}, profile {{ fleet.profile }}, {{ "%s a round at most"|format(fleet.deadline|duration) if fleet.deadline else "no deadline" }}, runtime {{ fleet.runtime }}</dd>
<dt>Simulated time</dt><dd>{% if fleet.simulated_seconds is none %}not simulated: it takes a fleet profile or a deadline{% else %}{{ fleet.simulated_seconds|duration }} on the fleet's clock{% endif %}</dd>
</dl>
{% if price %}
<div class="figures">{% for one in price %}{{ figure(one.svg, one.title, one.text) }}{% endfor %}</div>
{% endif %}
<h3>Who was left out</h3>
{% if left_out %}
<div class="wide"><table>
<thead><tr><th>Client</th><th>What</th><th>Why</th><th class="n">Rounds</th></tr></thead>
<tbody>
{% for one in left_out[:50] %}
<tr><td>{{ one.name }}</td><td>{{ one.what }}</td><td class="why">{{ one.reason }}</td><td class="n">{{ one.times|number }}</td></tr>
{% endfor %}
</tbody></table></div>
{% if left_out|length > 50 %}<p class="note">{{ times(left_out|length - 50, "more line") }}, each with no more rounds than these; <code>rounds.jsonl</code> holds every one.</p>{% endif %}
{% else %}
<p>Nobody: every client that was asked answered well and in time.</p>
{% endif %}

<h2>What ships to the edge</h2>
{% if edge.variants %}
<div class="wide"><table>
<caption>Every variant was exported to ONNX, checked against the trained model and measured on one thread, one example a call.</caption>
<thead><tr><th>Model</th><th class="n">Size</th><th class="n">Latency</th><th class="n">Load</th>{% if final.evaluated_by == "server" %}<th class="n">Accuracy<br>test</th>{% endif %}<th class="n">Accuracy<br>validation</th><th class="n">Largest<br>difference</th><th>Why</th></tr></thead>
<tbody>
{% for one in edge.variants %}
<tr{{ " class=chosen" if one.chosen }}><th scope="row">{{ one.name }}{% if one.chosen %}<br><span class="tag">ships as model.onnx</span>{% endif %}</th><td class="n">{{ one.bytes|size }}</td><td class="n">{{ one.latency_us|micros }}</td><td class="n">{{ (one.load_ms * 1000 if one.load_ms is not none else none)|micros }}</td>{% if final.evaluated_by == "server" %}<td class="n">{{ one.accuracy|percent }}</td>{% endif %}<td class="n">{{ one.validation_accuracy|percent }}</td><td class="n">{{ one.max_abs_diff|scientific }}</td><td class="why">{{ one.reason }}</td></tr>
{% endfor %}
</tbody></table></div>
{% else %}
<p>No edge model was made.</p>
{% endif %}
<dl>
{% if edge.rule %}<dt>Rule of choice</dt><dd>{{ edge.rule }}</dd>{% endif %}
{% if edge.recovery is defined and edge.recovery %}<dt>Recovery</dt><dd>{{ edge.recovery }}</dd>{% endif %}
</dl>
{% if chosen %}<pre>python -m edge_export.infer model.onnx input.npy</pre>{% endif %}

<h2>How to reproduce it</h2>
<pre>{{ command }}</pre>
<dl>
<dt>Seeds</dt><dd>{{ run.seeds }}</dd>
<dt>Versions</dt><dd>{% for name, version in run.versions.items() %}{{ name }} {{ version }}{{ ", " if not loop.last }}{% endfor %}</dd>
<dt>Changed settings</dt><dd>{% for name, value in run.changed.items() %}<code>{{ name }}={{ value|setting }}</code> {% else %}none: the scenario's own values{% endfor %}</dd>
</dl>
<details><summary>All {{ run.settings|length }} settings</summary>
<dl>{% for name, value in run.settings.items() %}<dt>{{ name }}</dt><dd>{{ value|setting }}</dd>{% endfor %}</dl>
</details>
{% endblock %}
"""
