"""A plan. Filled by server/plan_page.py."""
# ruff: noqa: E501

TEXT = r"""{% extends "page" %}
{% block title %}A plan for {{ plan.scenario }}{% endblock %}
{% block subtitle %}<p>ε {{ "%g"|format(plan.target.epsilon) }} in {{ plan.rounds }} rounds, for {{ "one training example" if plan.unit == "example" else "one whole client" if plan.unit == "client" else plan.unit }}</p>{% endblock %}

{% block body %}
<div class="tiles">
<div><b>{{ plan.noise_multiplier|number }}</b><span>noise multiplier, the most of any client</span></div>
<div><b>{{ "%g"|format(plan.clip) }}</b><span>clipping norm</span></div>
<div><b>{{ plan.cohort }}</b><span>of {{ plan.clients.count }} clients a round</span></div>
<div><b>{{ plan.rounds }}</b><span>rounds{% if plan.recover_rounds %}, and {{ plan.recover_rounds }} of recovery{% endif %}</span></div>
<div><b>{{ plan.epsilon|epsilon }}</b><span>ε of the worst client, at δ {{ plan.delta|scientific }}</span></div>
<div><b>{{ plan.predicted_accuracy|percent }}</b><span>{% if plan.predicted_accuracy is not none %}predicted{% if plan.predicted_spread is not none %}, ± {{ plan.predicted_spread|percent }}{% endif %}{% else %}no forecast: {{ plan.predicted_accuracy_reason }}{% endif %}</span></div>
</div>
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
{% if plan.spent.refused %}
<h2>Who cannot pay for every round</h2>
<div class="wide"><table>
<thead><tr><th>Client</th><th class="n">ε spent</th><th class="n">Budget</th><th class="n">Rounds it can pay</th></tr></thead>
<tbody>
{% for one in plan.spent.refused %}
<tr><td>{{ one.client }}</td><td class="n">{{ one.spent|epsilon }}</td><td class="n">{{ one.budget|number }}</td><td class="n">{{ one.rounds }} of {{ one.of }}</td></tr>
{% endfor %}
</tbody></table></div>
{% endif %}
{% if plan.search %}
<h2>Searching for settings</h2>
<p>{{ "%g"|format(plan.search.trials) }} trials, all of them seen: ε {{ plan.search.composition_epsilon|epsilon }} by plain composition. The winner alone, of a secret number of trials ({{ plan.search.distribution }}): ε {{ plan.search.repeat_and_select_epsilon|epsilon }} by RepeatAndSelect.</p>
<p class="note">{{ terms }}</p>
{% endif %}
{% endblock %}
"""
