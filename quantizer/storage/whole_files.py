"""Files that are written whole or not at all, and their checksums."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from vlmq_export.errors import ArtifactError


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file so that `path` never holds half of it.

    `write` is called with a temporary file in the same folder. Once that is whole and on the disk,
    it gets mode 0644 and is renamed to `path`. Raises ArtifactError where it cannot be written; the
    temporary file is removed then.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        temporary.chmod(0o644)  # safetensors creates its files with mode 0600
        sync(temporary)
        temporary.replace(path)
    # safetensors reports failed input and output with an error that is no OSError.
    except (SafetensorError, OSError) as e:
        raise ArtifactError(
            f"{path}: cannot be written ({getattr(e, 'strerror', None) or e});"
            " free space and use --resume"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file is on the disk. Raises OSError."""
    with path.open("rb") as f:
        os.fsync(f.fileno())


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented JSON in UTF-8. Raises ArtifactError as `write_atomic` does.

    Numbers that are not finite become null, because JSON has none.
    """
    finite = json.loads(json.dumps(value), parse_constant=lambda _: None)
    write_atomic(path, lambda t: t.write_text(json.dumps(finite, indent=1) + "\n", "utf-8"))


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal. Raises OSError."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
