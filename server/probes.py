"""Which canaries audit which promise: a probe for each, by privacy.unit; two promises are two audits."""

from collections.abc import Mapping

from privacy.plan import Plan
from server.canaries import Probe
from server.canary_clients import by_client, by_local
from server.canary_examples import by_example

PROBES: dict[str, Mapping[str, Probe]] = {
    "none": {"example": by_example},
    "example": {"example": by_example},
    "client": {"client": by_client},
    "local": {"local": by_local},
    "both": {"example": by_example, "client": by_client},
}
"""By privacy.unit: what one change of the data is -> who tries it. client: by coins, of a fixed size, or by turns."""


def promised(plan: Plan, half: str) -> Plan:
    """The plan that the claim of `half` rests on."""
    return plan.whole if plan.whole and half == "client" else plan
