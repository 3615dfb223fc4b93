"""The privacy statement within a report: for a person who must sign it. Filled by server/report.py."""
# ruff: noqa: E501

TEXT = r"""{% set stated = run.statement %}
<h2>The privacy statement</h2>
<p class="lead">{{ stated.interpretation.sentence }}</p>
<div class="tiles">
<div><b>{% if stated.epsilon.headline is none %}none{% else %}ε {{ stated.epsilon.headline|epsilon }}{% endif %}</b><span>{% if stated.epsilon.headline is none %}{{ stated.epsilon.reason or stated.interpretation.reason }}{% else %}at δ {{ stated.composition.adaptive.delta|scientific }}, the costliest client; between {{ stated.epsilon.clients.least|epsilon }} and {{ stated.epsilon.clients.most|epsilon }} over {{ run.privacy.clients|length|number }}{% endif %}</span></div>
<div><b>{% if stated.interpretation.posterior is none %}–{% else %}{{ (100 * stated.interpretation.posterior)|fixed(2) }} %{% endif %}</b><span>what an even bet on one of them can become{% if stated.interpretation.posterior is none %}: unbounded{% endif %}</span></div>
<div><b>{{ stated.interpretation.tpr_at_1_percent_fpr|percent }}</b><span>found by the best membership test with 1 % false alarms{% if stated.interpretation.tpr_at_1_percent_fpr is none %}: unbounded{% endif %}</span></div>
<div><b>{% if stated.composition.epsilon_total is none %}–{% else %}ε {{ stated.composition.epsilon_total|epsilon }}{% endif %}</b><span>{% if stated.composition.epsilon_total is none %}{{ stated.composition.epsilon_total_reason }}{% else %}over all runs on this data that the ledger knows; {{ times(stated.composition.earlier_runs, "other run") }}{% endif %}</span></div>
</div>

<h3>Who could learn what</h3>
<div class="wide"><table>
<thead><tr><th>Who</th><th>Sees</th><th>Before noise</th><th class="n">ε against it</th><th></th></tr></thead>
<tbody>
{% for one in parties %}
<tr><th scope="row">{{ one.party }}</th><td>{{ one.sees }}</td><td>{{ "yes" if one.before_noise else "no" }}</td><td class="n">{{ one.epsilon|epsilon }}</td><td class="why">{{ one.reason or "" }}</td></tr>
{% endfor %}
</tbody></table></div>
<p class="note">{{ stated.trust.adversary }}</p>
{% if proof %}
<div class="figures">{% for one in proof %}{{ figure(one.svg, one.title, one.text) }}{% endfor %}</div>
{% endif %}

{% if budgets %}
<h3>Accounts in the ledger</h3>
<div class="wide"><table>
<caption>{% if budgets[0].budget is none %}No budget over runs was set: bars are shares of the largest account.{% else %}Spent over all runs, of the budget for the ledger's life.{% endif %}{% if budgets|length < run.privacy.clients|length %} The {{ budgets|length }} accounts with the least left.{% endif %}</caption>
<tbody>
{% for one in budgets %}
<tr><td>{{ one.name }}</td><td class="n">{{ one.epsilon_total|epsilon }}{% if one.budget is not none %} of {{ one.budget|epsilon }}{% endif %}</td><td class="bar"><i class="own" style="width:{{ "%.2f"|format(100 * one.share) }}%"></i></td></tr>
{% endfor %}
</tbody></table></div>
{% endif %}

<h3>Hazards</h3>
<div class="wide"><table>
<thead><tr><th>Hazard</th><th></th><th>Why</th></tr></thead>
<tbody>
{% for one in stated.interpretation.hazards %}
<tr><td class="differs">{{ one.hazard }}</td><td class="{{ one.state }}">{{ one.state }}</td><td class="why">{{ one.why }}</td></tr>
{% endfor %}
</tbody></table></div>

<h3>Files that {{ "inherit the guarantee" if run.privacy.guarantee else "were exported" }}</h3>
{% if stated.post_processing.files %}
<div class="wide"><table>
<thead><tr><th>File</th><th class="n">Size</th><th>SHA-256</th></tr></thead>
<tbody>
{% for one in stated.post_processing.files %}
<tr><td>{{ one.file }}</td><td class="n">{{ one.bytes|size }}</td><td><code>{{ one.sha256 }}</code></td></tr>
{% endfor %}
</tbody></table></div>
{% else %}<p>{{ stated.post_processing.files_reason }}</p>{% endif %}
<p class="note">{{ stated.post_processing.validation_part }}.</p>

<details><summary>All seventeen groups</summary>
{% for name, group in groups.items() %}
<h4>{{ loop.index }}. {{ name.replace("_", " ") }}</h4>
<dl>{% for one in group %}<dt>{{ one.name }}</dt><dd{{ " class=why" if one.reason }}>{{ "none: " ~ one.reason if one.reason else one.text }}</dd>{% endfor %}</dl>
{% endfor %}
</details>

<h3>To check it and to sign it</h3>
<pre>{{ stated.reproduction.check }}
{% if stated.reproduction.verify_ledger %}{{ stated.reproduction.verify_ledger }}
{{ stated.reproduction.recompute }}
{% endif %}</pre>
<dl>
<dt>Report</dt><dd>{{ stated.identity.report }}, {{ stated.identity.date }}</dd>
<dt>Digest of report.json</dt><dd><code>{{ run.digest }}</code></dd>
<dt>Signature</dt><dd>{% if stated.reproduction.signed_by %}report.json.sig, by the Ed25519 key <code>{{ stated.reproduction.signed_by }}</code>{% else %}none: {{ stated.reproduction.signed_by_reason }}{% endif %}</dd>
</dl>
<div class="sign">{% for one in signers %}<p>{{ one }}</p>{% endfor %}</div>
"""
