"""SHA256SUMS of an output folder, in the format of `sha256sum --check`."""

from pathlib import Path

from vlmq_export.quantizer.artifact import write_atomic
from vlmq_export.quantizer.checkpoint import sha256_file
from vlmq_export.quantizer.untrusted import contained

SUMS = "SHA256SUMS"


def _files(folder: Path) -> list[Path]:
    files = (p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    return sorted(p for p in files if p.name != SUMS and not any(part.startswith(".") for part in p.parts))


def write_sums(folder: Path) -> None:
    lines = [f"{sha256_file(folder / p)}  {p.as_posix()}\n" for p in _files(folder)]
    write_atomic(folder / SUMS, lambda t: t.write_text("".join(lines), "utf-8"))


def changed_files(folder: Path) -> list[str] | None:
    """Files under `folder` that no longer match, with what is wrong; None when there is no checksum file."""
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
