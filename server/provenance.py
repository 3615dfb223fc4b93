"""Where a report comes from, and what it can be recognised by: its commit, digests of what it speaks of, its own."""

import hashlib
import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_HOUSE = Path(__file__).resolve().parent.parent


def canonical(value: Any) -> bytes:
    """JSON with sorted keys and no blanks, as UTF-8; numbers as Python writes them, the shortest that read back."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def sha256(data: bytes) -> str:
    """Hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def digest(report: Mapping[str, Any]) -> str:
    """What `report` carries as `digest`: over all the rest of it."""
    return sha256(canonical({key: value for key, value in report.items() if key != "digest"}))


def data_digest(clients: Mapping[str, str]) -> str:
    """One digest for the data of all clients, given as name -> keyed digest."""
    return sha256(canonical(sorted(clients.items())))


def exported(folder: Path) -> list[Path]:
    """The files of a run folder that hold a model, sorted."""
    found = [folder / "weights.safetensors", folder / "model.onnx", *(folder / "edge").glob("*")]
    return sorted(path for path in found if path.is_file() and path.suffix in (".safetensors", ".onnx"))


def git_commit() -> tuple[str | None, str | None]:
    """(the commit of the checkout that runs, "-changed" where files differ from it; else why there is none)."""
    try:
        top, commit = _git("rev-parse", "--show-toplevel", "HEAD").splitlines()
        if Path(top).resolve() != _HOUSE:
            return None, "the program does not run from a git checkout of its own"
        return commit + ("-changed" if _git("status", "--porcelain", "--untracked-files=no") else ""), None
    except (OSError, ValueError, subprocess.SubprocessError):
        return None, "the program does not run from a git checkout, or git is not installed"


def _git(*words: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(_HOUSE), *words], capture_output=True, text=True, check=True, timeout=10, errors="replace"
    )
    return done.stdout.strip()
