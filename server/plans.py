"""Plans: the privacy plan of every client; clients whose plans are equal share one."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from privacy.plan import Plan
from scenarios.numbered import Names, named


class Plans(Mapping[str, Plan]):
    """By name; who has none is not in it. 4 bytes a client."""

    def __init__(self, names: Names, kinds: Sequence[Plan], which: NDArray[np.int32]) -> None:
        """kinds: the distinct plans. which: (C,) the one of each client, as an index into them; -1: none."""
        self.names, self.kinds, self.which = names, tuple(kinds), which
        self._number = int(np.count_nonzero(which >= 0))

    def __getitem__(self, name: str) -> Plan:
        if (kind := int(self.which[self.names.place(name)])) < 0:
            raise KeyError(name)
        return self.kinds[kind]

    def __iter__(self) -> Iterator[str]:
        return (self.names[at] for at in np.flatnonzero(self.which >= 0).tolist())

    def __len__(self) -> int:
        return self._number

    @property
    def steps(self) -> NDArray[np.int64]:
        """(K,) the most steps of each kind."""
        return np.array([plan.steps for plan in self.kinds], np.int64)


def planned(plans: Mapping[str, Plan], names: Names) -> Plans:
    """`plans` over all clients `names`."""
    if isinstance(plans, Plans) and plans.names == names:
        return plans
    if not plans:
        return Plans(names, (), np.full(len(names), -1, np.int32))
    kinds: dict[Plan, int] = {}
    which = [kinds.setdefault(plans[name], len(kinds)) if name in plans else -1 for name in names]
    return Plans(names, list(kinds), np.array(which, np.int32))


def shared(clients: Iterable[str], plan: Plan) -> Plans:
    """One plan for all of `clients`."""
    names = named(clients)
    return Plans(names, (plan,), np.zeros(len(names), np.int32))
