"""The two Flower runtimes from the command line: submit the run to a SuperLink and follow it to its end.

Only Flower's public commands are used. They see a Flower home of their own in a temporary folder, so that the user's
Flower configuration is neither read nor changed.
"""

import json
import os
import queue
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from privacy.durable import write_atomic
from privacy.refused import Refused
from scenarios import Scenario
from scenarios.settings import Settings, knobs
from server.ray_cluster import Cluster
from server.run import Progress, Stopped
from server.superlink import COMMANDS, SuperLink, environment, own, running

STOP = "stop"
"""A file of this name in the run folder asks the run to stop after its running round."""

_LOG = "flower.log"
_PROJECT = Path(__file__).resolve().parent.parent


def run(
    reference: str,
    scenario: Scenario,
    settings: Settings,
    path: Path,
    progress: Progress,
    stop: Callable[[], bool],
    superlink: str = "",
    resume: bool = False,
    cluster: Cluster = Cluster(),
) -> Path:
    """Run `scenario`, which the user calls `reference`, to its end; returns the run folder, where the ServerApp ran.

    path: the run folder, unless the SuperLink is on another machine and settings.run.out leaves the choice to it.
    superlink: HOST:PORT of a running one, whose nodes take part (see `server.superlink.running`); empty: one of our
    own with as many simulated nodes on `cluster` as there are clients or, with local.engine=cohort, workers.
    Raises what the run raised: Refused, Stopped; RuntimeError for anything else, with the log left in the folder.
    """
    home = Path(tempfile.mkdtemp(prefix="umbel-flower-"))
    simulated = None if superlink else _simulated(scenario, settings, cluster)
    if simulated:
        settings = _here(settings, cluster, simulated)
    try:
        with _superlink(superlink, home, cluster) as link:
            out = path.absolute() if link.local or settings.run.out else None
            text = settings_text(scenario, settings, out, resume, clock="simulated" if simulated else "wall")
            number = _submit(link, home, reference, text, simulated)
            end = _Watch(link, home, number, out, progress, stop).follow()
        if end.code not in (0, 2, 3) and path.is_dir():
            shutil.copy(home / _LOG, path / _LOG)
            end = _End(end.code, f"{end.line} (see {path / _LOG})")
    finally:
        shutil.rmtree(home, ignore_errors=True)
    if end.code == 2:
        raise Refused(end.line)
    if end.code == 3:
        raise Stopped(end.line)
    if end.code != 0:
        raise RuntimeError(end.line)
    return Path(end.line)


def settings_text(scenario: Scenario, settings: Settings, out: Path | None, resume: bool, clock: str) -> str:
    """The `set` string that makes `settings` out of the scenario's own, on the server and on every node."""
    born = {name: value for name, value, _ in knobs(scenario.settings)}
    wanted = {name: value for name, value, _ in knobs(settings)}
    wanted |= {"run.out": str(out or ""), "run.resume": resume, "fleet.clock": clock}
    for name in ("run.data", "fleet.profile"):  # may be relative to where the user is; the nodes are elsewhere
        if wanted[name] and Path(wanted[name]).exists():
            wanted[name] = str(Path(wanted[name]).absolute())
    if wanted["run.state"]:
        wanted["run.state"] = str(Path(wanted["run.state"]).expanduser().absolute())
    changed = {name: "" if value is None else value for name, value in wanted.items() if value != born[name]}
    return " ".join(shlex.quote(f"{name}={value}") for name, value in changed.items())


@dataclass(frozen=True)
class _Simulated:
    """What Flower simulates."""

    nodes: int
    cpus: int | None
    """Of the Ray that it starts, on which so many of them work at once; None: those of this machine, or the cluster."""
    blocks: bool


def _simulated(scenario: Scenario, settings: Settings, cluster: Cluster) -> _Simulated:
    """One client a node or, where blocks of them are trained at once, a worker."""
    if settings.local.engine == "single":
        return _Simulated(len(scenario.data(settings).sizes), None, blocks=False)
    workers = cluster.workers(settings)
    return _Simulated(workers, None if cluster.address else workers, blocks=True)


def _here(settings: Settings, cluster: Cluster, simulated: _Simulated) -> Settings:
    """`settings` with what another machine of the cluster would take from its own environment, and who works."""
    told: dict[str, Any] = {"processes": simulated.nodes} if simulated.blocks else {}
    if cluster.address and not settings.run.data:
        told["data"] = os.environ.get("UMBEL_DATA", "")
    return settings.model_copy(update={"run": settings.run.model_copy(update=told)})


@contextmanager
def _superlink(text: str, home: Path, cluster: Cluster) -> Iterator[SuperLink]:
    if text:
        yield running(text)
    else:
        with own(home, cluster.address) as link:
            yield link


def _submit(link: SuperLink, home: Path, reference: str, text: str, simulated: _Simulated | None) -> str:
    """Hand the app to the SuperLink; returns the run's number."""
    connection = ["[superlink.umbel]", f"address = {_toml(link.address)}", f"insecure = {_toml(link.insecure)}"]
    if link.root_certificates:
        connection.append(f"root-certificates = {_toml(str(link.root_certificates))}")
    write_atomic(home / "config.toml", "\n".join([*connection, ""]).encode())
    name = str(Path(reference).resolve()) if reference.endswith(".py") else reference
    write_atomic(home / "run.toml", f"scenario = {_toml(name)}\nset = {_toml(text)}\n".encode())
    command = ["run", str(_PROJECT), "umbel", "--run-config", str(home / "run.toml")]
    if simulated:
        command += ["--federation-config", f"num-supernodes={simulated.nodes} client-resources-num-cpus=1"]
        command += ["--federation-config", f"init-args-num-cpus={simulated.cpus}"] if simulated.cpus else []
        command += ["--federation-config", 'init-args-logging-level="ERROR" init-args-log-to-driver=false']
    return str(_flwr(home, *command)["run-id"])


def _flwr(home: Path, *command: str) -> dict[str, Any]:
    """What a `flwr` command answers in JSON. Raises RuntimeError with its own words when it fails."""
    call = [str(COMMANDS / "flwr"), *command, "--format", "json"]
    done = subprocess.run(call, env=environment(home), stdin=subprocess.DEVNULL, capture_output=True, text=True)
    _, brace, rest = done.stdout.partition("{")  # words for people may come first
    try:
        answer = json.loads(brace + rest)
    except ValueError:
        answer = {}
    if not answer.get("success"):
        words = answer.get("error-message") or (done.stdout + done.stderr).strip()[-300:]
        raise RuntimeError(f"`flwr {command[0]}` failed: {' '.join(str(words).split())}")
    return dict(answer)


def _toml(value: str | bool) -> str:
    return json.dumps(value, ensure_ascii=False)


@dataclass(frozen=True)
class _End:
    """How a run ended: the command line's exit code, and one line (the run folder, if all is well)."""

    code: int
    line: str


class _Watch:
    """Follows one run: its lines come from its log, its rounds from the run folder, when that is on this machine."""

    def __init__(
        self,
        link: SuperLink,
        home: Path,
        number: str,
        out: Path | None,
        progress: Progress,
        stop: Callable[[], bool],
    ) -> None:
        self._home, self._number, self._progress, self._stop = home, number, progress, stop
        self._out = out if link.local else None
        self._seen = len(self._rows())
        self._halted = False

    def follow(self) -> _End:
        """Wait for the end of the run. A run that we leave early, by any exception, is stopped."""
        try:
            while not (end := self._stream() or self._status()):
                pass  # the stream was cut off, the run was not: read it again
        except BaseException:
            with suppress(RuntimeError):
                self._halt()
            raise
        finally:
            if self._out is not None:
                (self._out / STOP).unlink(missing_ok=True)
        self._show()
        return end

    def _stream(self) -> _End | None:
        """Read the run's log while it grows; the end that the ServerApp states in it, if it came to that."""
        command = [str(COMMANDS / "flwr"), "log", self._number, "umbel", "--stream"]
        log = subprocess.Popen(
            command,
            env=environment(self._home),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        reader = threading.Thread(target=_read, args=(log, self._home / _LOG, lines), daemon=True)
        reader.start()
        end = None
        try:
            while True:
                try:
                    line = lines.get(timeout=0.2)
                except queue.Empty:
                    line = ""
                if line is None:
                    return end
                end = self._hear(line) or end
                self._show()
                if self._stop():
                    self._ask_to_stop()
        finally:
            log.kill()
            log.wait()
            reader.join()

    def _hear(self, line: str) -> _End | None:
        head, _, words = line.strip().partition(" ")
        if head != "umbel:":
            return None
        if words.startswith("exit "):
            _, code, text = [*words.split(" ", 2), ""][:3]
            return _End(int(code), text) if code.isdigit() else None
        if words.startswith("worker "):  # one that died: it stands where that of an embedded run stands
            print(line.strip(), file=sys.stderr)
        elif self._out is None or not words.startswith(("round ", "folder ")):
            self._progress.status(words)
        return None

    def _show(self) -> None:
        rows = self._rows()
        for row in rows[self._seen :]:
            self._progress.row(json.loads(row))
        self._seen = len(rows)

    def _rows(self) -> list[bytes]:
        path = self._out / "rounds.jsonl" if self._out else None
        return path.read_bytes().split(b"\n")[:-1] if path and path.exists() else []

    def _status(self) -> _End | None:
        """The end of a run that states none itself; None while it goes on."""
        row = _flwr(self._home, "list", "umbel", "--run-id", self._number)["runs"][0]
        if not row["status"].startswith("finished"):
            return None
        if row["status"] == "finished:stopped":
            return _End(3, "stopped: `umbel resume` goes on from its last round")
        return _End(1, f"the run ended as {row['status']}: {row['status-details']}")

    def _ask_to_stop(self) -> None:
        """Let the run end its running round; where its folder is out of reach, end it now: its rounds are committed."""
        if self._out is None and not self._halted:
            self._halt()
        elif self._out is not None and self._out.is_dir():
            (self._out / STOP).touch()

    def _halt(self) -> None:
        self._halted = True
        _flwr(self._home, "stop", self._number, "umbel")


def _read(log: "subprocess.Popen[str]", copy: Path, lines: "queue.SimpleQueue[str | None]") -> None:
    """Pass the lines of `log` on, and keep them in `copy`; None at the end."""
    assert log.stdout is not None
    with copy.open("w", encoding="utf-8") as file, log.stdout:
        for line in log.stdout:
            file.write(line)
            lines.put(line)
    lines.put(None)
