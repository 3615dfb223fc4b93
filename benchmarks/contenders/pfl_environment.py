"""The environment of pfl: one of its own, made when it is first needed, with the torch that everybody else has."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

VERSION = "0.6.0"


def python() -> str:
    """Its interpreter. Raises RuntimeError with pip's last line where it cannot be made."""
    same = torch.__version__.partition("+")[0]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    folder = cache / "umbel" / f"benchmark-pfl-{VERSION}-torch-{same}"
    found = folder / "bin" / "python"
    index = os.environ.get("TORCH_INDEX", "").split()  # as in the Makefile
    if (folder / "ready").exists():
        return str(found)
    shutil.rmtree(folder, ignore_errors=True)
    print(f"making the environment of pfl {VERSION} in {folder}", file=sys.stderr, flush=True)
    for command in (
        [sys.executable, "-m", "venv", str(folder)],
        [str(found), "-m", "pip", "install", "--quiet", f"pfl=={VERSION}", f"torch=={same}", *index],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"pfl cannot be installed: {(done.stderr.strip() or done.stdout).splitlines()[-1]}")
    (folder / "ready").touch()
    return str(found)
