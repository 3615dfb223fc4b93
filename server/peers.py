"""Peers: what the server's ledger and the devices' own hold against each other when they meet."""

from collections.abc import Mapping

from clients.task import Hello
from privacy import heads
from privacy.ledger import Account, Head, Ledger
from privacy.refused import Refused


def check(
    ledger: Ledger, roster: Mapping[str, Hello], before: Mapping[Account, Head], met: Mapping[Account, Head]
) -> None:
    """Refuse a ledger, this one or a device's, that does not go on from what the other side saw of it.

    before: heads of devices that were known before the clients said hello. met: those that they said.
    """
    for name, hello in roster.items():
        if hello.seen is not None and not ledger.holds(hello.seen):
            raise Refused(
                f"{ledger.path} does not go on from its record {hello.seen.sequence}, which client {name} saw: it was "
                "rolled back, or is another ledger; bring it back, or charge what the devices wrote down by "
                "`umbel ledger adopt`"
            )
    # Which device is behind hangs on who was drawn: it is said here, to the operator, and no row or report may say it.
    for account, head in met.items():
        known = before.get(account, head)
        if head.sequence < known.sequence or (head.sequence == known.sequence and head != known):
            raise Refused(
                f"the own ledger of client {account.client} ends before what {ledger.path} heard of it: it was rolled "
                "back or is gone; leave its node out, or bring its files back, or use `umbel ledger adopt` there and "
                f"then `umbel ledger forget {account.client}` here"
            )


def once_secret(ledger: Ledger) -> bool:
    """Whether a round of any run was drawn in secret: from then on a device's head tells how often it was drawn."""
    drawn = (standing for unit, standing in ledger.accounts.distinct() if unit == "client")
    return heads.place(ledger).exists() or any(
        mechanism.sampling_rate < 1 for standing in drawn for mechanism in standing.history
    )
