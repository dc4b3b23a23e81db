"""Answers that are known already, so that a stopped evaluation goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from vlmq_export.errors import BenchmarkError
from vlmq_export.quantizer.storage.whole_files import sha256_file

ANSWERS = "eval"  # folder of the answers, in the output folder


def files_hash(folder: Path) -> str:
    """SHA-256 over the names and contents of all files in a folder."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    lines = [f"{sha256_file(p)}  {p.relative_to(folder).as_posix()}\n" for p in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


class Known:
    """The answers of one model, in a file with a line for each.

    files: SHA-256 of the files that gave the answers.
    runtime: the package that ran them, with its version.

    The first line has these two. A file of others is not read, and is replaced with the first
    answers. Nor is a line that was cut off.
    """

    def __init__(self, path: Path, files: str, runtime: str):
        self.path = path
        self._head = {"files": files, "runtime": runtime}
        self._answers: dict[str, str] = {}
        lines = path.read_text("utf-8", errors="replace").splitlines() if path.is_file() else []
        self._begun = bool(lines) and _object(lines[0]) == self._head
        for line in lines[1:] if self._begun else ():
            found = _object(line)
            if isinstance(found.get("key"), str) and isinstance(found.get("answer"), str):
                self._answers[found["key"]] = found["answer"]

    def __contains__(self, key: str) -> bool:
        return key in self._answers

    def __getitem__(self, key: str) -> str:
        return self._answers[key]

    def add(self, answers: Mapping[str, str]) -> None:
        """Keep answers by the keys of their questions. Raises BenchmarkError without space."""
        lines = [json.dumps({"key": key, "answer": answer}) for key, answer in answers.items()]
        lines = lines if self._begun else [json.dumps(self._head), *lines]
        try:
            self.path.parent.mkdir(exist_ok=True)
            with self.path.open("a" if self._begun else "w", encoding="utf-8") as file:
                # What a killed process wrote last may have no end.
                file.write("\n" * self._begun + "\n".join(lines) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as e:
            raise BenchmarkError(
                f"{self.path}: cannot be written ({e.strerror}); free space and run it again"
            ) from None
        self._begun = True
        self._answers |= answers


def _object(line: str) -> dict:
    """The JSON object of a line; empty for anything else."""
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
