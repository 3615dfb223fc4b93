"""A plan. Filled by server/plan_page.py."""
# ruff: noqa: E501

TEXT = r"""{% extends "page" %}
{% block title %}A plan for {{ plan.scenario }}{% endblock %}
{% block subtitle %}<p>ε {{ "%g"|format(plan.target.epsilon) }} in {{ plan.rounds }} rounds, for {{ unit }}</p>{% endblock %}

{% block body %}
<div class="tiles">
<div><b>{{ plan.noise_multiplier|number }}</b><span>noise multiplier, the most of any client</span></div>
<div><b>{{ "%g"|format(plan.clip) }}</b><span>clipping norm</span></div>
<div><b>{{ plan.cohort }}</b><span>of {{ plan.clients.count }} clients a round</span></div>
<div><b>{{ plan.rounds }}</b><span>rounds{% if plan.recover_rounds %}, and {{ plan.recover_rounds }} of recovery{% endif %}</span></div>
<div><b>{{ plan.epsilon|epsilon }}</b><span>ε of the worst client, at δ {{ plan.delta|scientific }}</span></div>
<div><b>{{ plan.predicted_accuracy|percent }}</b><span>{% if plan.predicted_accuracy is not none %}predicted{% if plan.predicted_spread is not none %}, ± {{ plan.predicted_spread|percent }}{% endif %}{% else %}no forecast: {{ plan.predicted_accuracy_reason }}{% endif %}</span></div>
</div>
{% if plan.whole or plan.tests %}
<h2>Promises</h2>
<div class="wide"><table>
<thead><tr><th>About</th><th class="n">ε, worst client</th><th class="n">δ</th><th class="n">Noise multiplier</th><th class="n">Clip</th><th class="n">Sampling rate</th><th class="n">ε so far</th><th class="n">ε after</th></tr></thead>
<tbody>
{% for name, one in promises %}
<tr><td>{{ name }}</td><td class="n">{{ one.epsilon|epsilon }}</td><td class="n">{{ one.delta|scientific }}</td><td class="n">{{ one.noise_multiplier|number }}</td><td class="n">{{ one.clip|number }}</td><td class="n">{{ one.sampling_rate|number }}</td><td class="n">{{ one.spent|epsilon }}</td><td class="n">{{ one.epsilon_total|epsilon }}</td></tr>
{% endfor %}
</tbody></table></div>
<p class="note">Each has an account of its own: they are about different neighbours and do not add up.{% if plan.tests %} Test results are noised in {{ plan.tests.evaluations }} evaluations.{% endif %}</p>
{% endif %}
<pre>{{ plan.command }}</pre>
{% if curve %}
<h2>Accuracy against ε</h2>
<p class="note">{{ warning }}</p>
<div class="figures"><figure><figcaption><b>Accuracy by ε.</b> Means of the federations that were run, {{ plan.curve_rounds }} of {{ plan.rounds }} rounds each; band: one standard deviation.</figcaption>
{{ curve }}</figure></div>
{% endif %}
<h2>Clients by size</h2>
<div class="wide"><table>
<thead><tr><th class="n">Examples</th><th class="n">Clients</th><th class="n">Steps a round</th><th class="n">Sampling rate</th><th class="n">Noise multiplier</th><th class="n">δ</th><th class="n">ε of the run</th><th class="n">ε so far</th><th class="n">ε after</th></tr></thead>
<tbody>
{% for row in plan.per_size %}
<tr><td class="n">{{ row.examples|number }}</td><td class="n">{{ row.clients }}</td><td class="n">{{ row.local_steps }}</td><td class="n">{{ row.sampling_rate|number }}</td><td class="n">{{ row.noise_multiplier|number }}</td><td class="n">{{ row.delta|scientific }}</td><td class="n">{{ row.epsilon|epsilon }}</td><td class="n">{{ row.spent|epsilon }}</td><td class="n">{{ row.epsilon_total|epsilon }}</td></tr>
{% endfor %}
</tbody></table></div>
{% for title, short in [("Who cannot pay for every round", plan.spent.refused), ("Who cannot pay for every evaluation", plan.tests.refused if plan.tests else [])] if short %}
<h2>{{ title }}</h2>
<div class="wide"><table>
<thead><tr><th>Client</th><th>Account</th><th class="n">ε spent</th><th class="n">Budget</th><th class="n">Left in its window</th><th class="n">Times it can pay</th><th>All of them from</th></tr></thead>
<tbody>
{% for one in short %}
<tr><td>{{ one.client }}</td><td>{{ one.unit }}, {{ one.dataset }}</td><td class="n">{{ one.spent|epsilon }}</td><td class="n">{{ one.budget|number }}</td><td class="n">{% if one.window %}{{ one.window.left|number }} of {{ one.window.epsilon|number }} in {{ one.window.days|number }} days{% else %}–{% endif %}</td><td class="n">{{ one.rounds }} of {{ one.of }}</td><td>{{ one.ready or "–" }}</td></tr>
{% endfor %}
</tbody></table></div>
{% endfor %}
{% if plan.search %}
<h2>Searching for settings</h2>
<p>{{ "%g"|format(plan.search.trials) }} trials of {{ plan.search.candidates }} settings; the winner alone is one of a secret number of trials, so many on average ({{ plan.search.distribution }}).</p>
<div class="wide"><table>
<thead><tr><th>Account</th><th class="n">ε of all trials, plain composition</th><th class="n">ε of the winner alone, RepeatAndSelect</th></tr></thead>
<tbody>
{% for name, one in sought %}
<tr><td>{{ name }}{% if one.candidates < plan.search.candidates %}, charged by {{ one.candidates }} of {{ plan.search.candidates }} settings{% endif %}</td><td class="n">{% if one.composition_epsilon is none %}∞{% else %}{{ one.composition_epsilon|epsilon }}{% endif %}</td><td class="n">{% if one.reason %}no claim: {{ one.reason }}{% else %}{{ one.repeat_and_select_epsilon|epsilon }}{% endif %}</td></tr>
{% endfor %}
</tbody></table></div>
<p class="note">{{ terms }}</p>
{% endif %}
{% endblock %}
"""
