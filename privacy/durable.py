"""Durable files: content that is there whole or not at all, after a crash too, and secrets that are made once."""

import os
import secrets
from pathlib import Path


def write_atomic(path: Path, content: bytes, private: bool = False) -> None:
    """Replace `path` by `content`, durably: a crash leaves the old file or the new one, never a part.

    private: for its owner's eyes alone (mode 0600).
    """
    partial = path.with_name(path.name + ".partial")
    if private:
        partial.unlink(missing_ok=True)  # what a crash left may be open to others
    flags, mode = os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600 if private else 0o666
    with os.fdopen(os.open(partial, flags, mode), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync_folder(path.parent)


def remove(*paths: Path) -> None:
    """Remove files and what a crash left of their next content, where they are, durably."""
    for path in paths:
        for name in (path, path.with_name(path.name + ".partial")):
            name.unlink(missing_ok=True)
    for folder in {path.parent for path in paths}:
        sync_folder(folder)


def secret(path: Path, first: bytes = b"") -> bytes:
    """The 32 secret bytes in `path`, for its owner's eyes alone (mode 0600); made at first use.

    first: what they are then; empty: from the operating system's entropy.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        mine = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
        try:
            with os.fdopen(os.open(mine, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(first or secrets.token_bytes(32))
                file.flush()
                os.fsync(file.fileno())
            os.link(mine, path)  # the first of several processes wins; nobody reads a half-written secret
        except FileExistsError:
            pass
        finally:
            mine.unlink(missing_ok=True)
        sync_folder(path.parent)
    return path.read_bytes()


def sync_folder(path: Path) -> None:
    """Make what was renamed, made or removed in this folder durable."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
