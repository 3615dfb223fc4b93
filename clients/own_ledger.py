"""OwnLedger: what a device has spent, on the device's own disk; it reserves before training and replays, never redraws.

Only under noise that the device itself adds and draws for real (no privacy.noise_seed): on gradients, on its update, on
its test results.
"""

import hashlib
import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from clients import admission, cohort
from clients.task import Charge, Hello, Reply, Task
from clients.training import Node
from privacy import accounting
from privacy.chain import Head
from privacy.durable import write_atomic
from privacy.ledger import TESTS, Account, Ledger
from privacy.plan import Mechanism
from privacy.refused import Refused

_UNITS = ("example", "both", "local")
"""Units whose noise the client adds, or a part of it."""
_LOCAL_DELTA = 1e-6
"""A device does not know how many clients there are; 1 / n must be well above this."""


@dataclass(frozen=True)
class OwnLedger:
    """The ledger node.ledger in the state folder of a device, and beside it each client's last reply.

    Guarantee: whatever the server asks for, or asks again, and whenever this process dies, the spending that is read
    back is never below what left the device, and never above the owner's budget.
    """

    folder: Path
    budget: float | None = None
    """Epsilon that the owner allows over the ledger's life; None: all is recorded, nothing refused."""

    @classmethod
    def of(cls, folder: Path, budget: object) -> "OwnLedger":
        """budget: as the node config has it, None where it has none. Raises Refused for what is no budget."""
        if budget is None:
            return cls(folder)
        if isinstance(budget, bool) or not isinstance(budget, int | float) or not 0 < budget < math.inf:
            raise Refused(f"budget={budget} of the node config is no number above 0: write budget=10, or leave it out")
        return cls(folder, float(budget))

    @property
    def path(self) -> Path:
        return self.folder / "node.ledger"

    def greet(self, node: Node, hello: Hello) -> Hello:
        """`hello` with this ledger's head, and the server's as last seen here; opens the account.

        Raises Refused for a ledger that cannot be used, and for a run that an owner's budget cannot be kept in.
        """
        if not self._kept(node) or not hello.examples:
            return hello
        ledger, account = Ledger(self.path), _account(node, hello.name)
        self._open(ledger, account, _delta(node, hello.examples), {account: hello.digest})
        return replace(hello, head=ledger.seal(), seen=ledger.seen.get(account))

    def answer(self, node: Node, task: Task) -> Reply:
        """Do what `task` asks, if the account pays for it. Never raises: a failure is a Reply with a reason."""
        try:
            if task.kind == "protect" or not self._kept(node, task.kind == "evaluate"):
                return cohort.alone(node, task)
            if not (task.mechanism or task.update_noise) or task.charge is None:
                raise Refused("the task is not charged to a ledger, or is without noise")
            return self._charged(node, task, task.charge)
        except Refused as error:  # where this device keeps its files is nobody else's business
            return Reply(
                task.round, task.client, reason=f"its own ledger: {error}".replace(f"{self.folder}/", "")[:200]
            )
        except OSError as error:
            return Reply(task.round, task.client, reason=f"its own ledger: {error.strerror}")
        except Exception as error:  # of its data, whose values a message may quote
            return Reply(task.round, task.client, reason=f"failed with {type(error).__name__}")

    def _charged(self, node: Node, task: Task, charge: Charge) -> Reply:
        ledger, account = Ledger(self.path), _account(node, task.client, task.kind == "evaluate")
        if charge.known is not None and not ledger.holds(charge.known):
            raise Refused(
                "does not go on from the record that the server saw last: it was rolled back; "
                "bring it back, or use `umbel ledger adopt` on this node"
            )
        ledger.read()
        if ledger.attempt(charge.run, account) == (task.round, charge.attempt):
            return self._again(account, task, charge)
        held = len(node.federation.client(task.client).y)
        admission.check(task, node.settings, held)
        admission.check_noise(task, node.settings, held)
        known = ledger.accounts.get(account)
        delta = known.delta if known else _delta(node, held)
        self._open(ledger, account, delta)
        by_round = task.mechanism is None or task.kind == "evaluate"  # one release, whatever the local steps
        mechanism = task.mechanism or Mechanism(1.0, task.update_noise)
        asked = {account: (mechanism, 1 if by_round else task.steps)}
        if short := ledger.reserve(charge.run, task.round, asked, charge.attempt, {account: charge.head}):
            raise Refused(f"epsilon {short[account]}")
        head = ledger.chain.head  # what comes after it is not durable yet
        reply = cohort.alone(node, task)
        if not reply.reason:
            reply = replace(reply, head=head)
            self._keep(account, reply, charge)
        if not reply.reason or reply.late:  # late: not one step was taken
            ledger.commit(charge.run, task.round, {account: 0 if reply.late else 1 if by_round else reply.steps})
        return reply

    def _open(self, ledger: Ledger, account: Account, delta: float, data: dict[Account, str] | None = None) -> None:
        ledger.open({account: (self.budget, delta)}, data=data or {})

    def _kept(self, node: Node, tests: bool = False) -> bool:
        """Whether tasks of this run (tests: its evaluations) are charged here.

        Raises Refused where a budget could not be kept.
        """
        wanted = node.settings.privacy
        charged = wanted.unit in _UNITS and wanted.noise_seed is None
        if self.budget is not None and not charged:
            raise Refused(
                f"the owner's budget of {self.budget:g} is for noise that this node adds: privacy.unit="
                f"{', '.join(_UNITS)}, and no privacy.noise_seed"
            )
        evaluation = node.settings.evaluation
        if self.budget is not None and evaluation.epsilon is None and (tests or evaluation.on == "clients"):
            raise Refused(
                f"the owner's budget of {self.budget:g} lets no test results leave without noise: "
                "evaluation.on=server, or evaluation.epsilon"
            )
        return evaluation.epsilon is not None and wanted.noise_seed is None if tests else charged

    def _keep(self, account: Account, reply: Reply, charge: Charge) -> None:
        """Keep the reply, durably, before it may leave: one file an account, the last reply alone."""
        rest = asdict(replace(reply, payload=b"")) | {"run": charge.run, "attempt": charge.attempt}
        rest["payload"] = hashlib.sha256(reply.payload).hexdigest()
        write_atomic(self._file(account), json.dumps(rest).encode() + b"\n" + reply.payload)

    def _again(self, account: Account, task: Task, charge: Charge) -> Reply:
        """The very bytes that answered this attempt: fresh noise under an old reservation would cost twice."""
        try:
            line, _, payload = self._file(account).read_bytes().partition(b"\n")
            rest = json.loads(line)
            run, attempt, digest = rest.pop("run"), rest.pop("attempt"), rest.pop("payload")
            if (run, rest["round"], attempt) == (charge.run, task.round, charge.attempt) and (
                digest == hashlib.sha256(payload).hexdigest()
            ):
                return Reply(**{**rest, "payload": payload, "head": Head(*rest["head"])})
        except (OSError, ValueError, KeyError, TypeError):
            pass
        raise Refused(f"attempt {charge.attempt} of round {task.round} was begun before and its reply is not kept")

    def _file(self, account: Account) -> Path:
        return self.folder / f"{hashlib.sha256(json.dumps(account).encode()).hexdigest()[:16]}.reply"


def _delta(node: Node, examples: int) -> float:
    """privacy.delta, else 1 / (10 x the examples); where the unit is a client one for a fleet of any likely size."""
    wanted = node.settings.privacy
    return wanted.delta or (_LOCAL_DELTA if wanted.unit == "local" else accounting.default_delta(examples))


def _account(node: Node, client: str, tests: bool = False) -> Account:
    unit, data = node.settings.privacy.unit, node.scenario.dataset or node.scenario.name
    if tests:
        return Account("example", client, data + TESTS)
    return Account("example" if unit == "both" else unit, client, data)
