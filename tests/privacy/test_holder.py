"""What server and key holder say to each other: read back as it was, hostile bytes refused, a process that ends."""

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from privacy import bfv, holder
from privacy.child import Child
from privacy.holder import Remote, Unreachable
from privacy.integers import Grid
from privacy.keyholder_process import Process
from privacy.refused import Refused

Gather = Any
CLIENTS = {f"silo-{i}": bytes([i + 1]) * 32 for i in range(3)}


@given(fields=st.dictionaries(st.text(), st.integers() | st.text()), parts=st.lists(st.binary()))
def test_a_message_is_read_back_as_it_was(fields: dict[str, Any], parts: list[bytes]) -> None:
    assert holder.unpack(holder.pack(fields, *parts)) == (fields, parts)


@given(data=st.binary())
def test_bytes_that_are_no_message_are_a_value_error_alone(data: bytes) -> None:
    try:
        fields, _ = holder.unpack(data)
    except ValueError:
        return
    assert isinstance(fields, dict)


def test_a_key_holder_answers_whatever_it_is_asked_and_opens_nothing_by_it(gather: Gather) -> None:
    cohort, draw = gather(), random.Random(0)
    parameters = cohort.parameters.to_bytes().hex()
    asked = {"do": "open", "run": "run", "round": 1, "roster": ["silo-0"], "grid": {}, "attempt": 1, "minimum": 3}
    good = [
        holder.pack({"do": "deal", "run": "run", "rounds": 5, "parameters": parameters}),
        holder.pack(asked, b"", b""),
        holder.pack(asked | {"grid": asdict(Grid(8, 16, 1.0, 3)), "minimum": "3"}, b"", b""),
    ]
    made = [
        *(holder.pack(fields, b"x", b"y") for fields in ({}, {"do": "open"}, {"do": "deal"}, {"do": "sign"})),
        holder.pack({"do": "deal", "run": 1, "rounds": 5, "parameters": parameters}),
        holder.pack({"do": "deal", "run": "run", "rounds": 5, "parameters": "zz"}),
        holder.pack({"do": "deal", "run": "run", "rounds": 4, "parameters": parameters}),
        *good[1:],
        b"",
        (8).to_bytes(4, "little") + b"[" * 8,
        (200_000).to_bytes(4, "little") + b"[" * 200_000,
    ]
    for data in made:
        said, parts = holder.unpack(holder.answer(cohort.holder, data))
        assert list(said) == ["refused"]
        assert not parts
    for _ in range(500):
        data = bytearray(draw.choice(good))
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        said, _ = holder.unpack(holder.answer(cohort.holder, bytes(data)))
        assert "refused" in said or "recipients" in said
    assert cohort.holder.opened("run", 1) is None


NO_DEALS: list[dict[str, Any]] = [{}, {"recipients": ["a"]}, {"recipients": {}, "minimum": "3"}]
NO_DEALS += [{"recipients": {}, "minimum": 3, "noise": noise} for noise in ([1], "loud", {"multiplier": "1"})]


@pytest.mark.parametrize("answer", [b"", b"\0\0\0\0", *(holder.pack(said, *[b""] * 4) for said in NO_DEALS)])
def test_an_answer_that_is_none_is_as_good_as_no_key_holder(answer: bytes) -> None:
    remote = Remote(lambda _: answer)
    with pytest.raises(Unreachable):
        remote.deal("run", 5, bfv.fit("split", 10, 20, 3))


def test_a_process_that_died_is_started_again_as_the_same_key_holder(tmp_path: Path) -> None:
    process, parameters = Process(tmp_path / "keys", CLIENTS, 3, 3), bfv.fit("split", 10, 20, 3)
    try:
        first = process.deal("run", 5, parameters)
        assert first.recipients == {name: key.hex() for name, key in CLIENTS.items()}
        assert first.minimum == 3
        assert process.pid
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(Unreachable, match="the key holder's process is gone"):
            process.deal("run", 5, parameters)
        assert process.deal("run", 5, parameters).key_id == first.key_id
        with pytest.raises(Refused, match="another key holder uses"):
            Process(tmp_path / "keys", CLIENTS, 3, 3)
    finally:
        process.close()


def test_a_process_says_in_one_line_why_it_is_no_key_holder(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="at most 3 can be met"):
        Process(tmp_path / "keys", CLIENTS, 3, 4)


def test_a_child_ends_with_the_one_that_started_it() -> None:
    code = (
        "from privacy.child import Child; import os, sys\n"
        "child = Child('import sys; sys.stdin.buffer.read()'); print(child.pid, flush=True); os._exit(0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    limit = time.monotonic() + 30
    while Path(f"/proc/{int(done.stdout)}").exists() and _state(int(done.stdout)) != "Z":
        assert time.monotonic() < limit
        time.sleep(0.05)


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def test_a_child_that_does_not_answer_is_an_os_error() -> None:
    child = Child("import time; time.sleep(60)")
    with pytest.raises(TimeoutError, match="no answer"):
        child.read(1, 0.05)
    child.close()
    with pytest.raises(BrokenPipeError, match="it ended"):
        Child("pass").read(1, 30)
