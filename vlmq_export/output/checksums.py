"""SHA256SUMS of an output folder, in the format of `sha256sum --check`."""

from __future__ import annotations

from pathlib import Path

from vlmq_export.quantizer.storage.untrusted import contained
from vlmq_export.quantizer.storage.whole_files import sha256_file, write_atomic

SUMS = "SHA256SUMS"


def write_sums(folder: Path) -> None:
    """Write the checksums of all files in the folder and below it."""
    lines = [f"{sha256_file(folder / p)}  {p.as_posix()}\n" for p in _files(folder)]
    write_atomic(folder / SUMS, lambda t: t.write_text("".join(lines), "utf-8"))


def changed_files(folder: Path) -> list[str] | None:
    """Names of files that no longer match, each with what is wrong; None without a SHA256SUMS."""
    sums = folder / SUMS
    if not sums.is_file():
        return None
    wrong = []
    for line in sums.read_text("utf-8", errors="replace").splitlines():
        digest, _, name = line.partition("  ")
        try:
            path = contained(folder, name)
        except ValueError as e:
            wrong.append(str(e))
            continue
        if not path.is_file():
            wrong.append(f"{name} (missing)")
        elif sha256_file(path) != digest:
            wrong.append(f"{name} (changed)")
    return wrong


def _files(folder: Path) -> list[Path]:
    """The files that are listed, relative to the folder; no hidden one is, nor SHA256SUMS."""
    files = (p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    return sorted(
        p for p in files if p.name != SUMS and not any(part.startswith(".") for part in p.parts)
    )
