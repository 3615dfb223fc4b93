"""No test touches the user's own privacy ledgers, and no file of tests those of another."""

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator

import pytest

_STATE = tempfile.mkdtemp(prefix="umbel-tests-")
os.environ["UMBEL_STATE"] = _STATE  # inherited by every process that a test starts
atexit.register(shutil.rmtree, _STATE, ignore_errors=True)


@pytest.fixture
def flower_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process of Flower's: messages can be made."""
    from flwr.supercore.task_identity import TaskIdentity

    for name in ("run_id", "node_id", "task_id"):
        monkeypatch.setattr(TaskIdentity, f"_{name}", 1, raising=False)


@pytest.fixture(autouse=True, scope="module")
def _own_ledgers() -> Iterator[None]:
    """Which files share a process depends on how many there are: what one spends must not be another's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UMBEL_STATE", tempfile.mkdtemp(dir=_STATE))
        yield
