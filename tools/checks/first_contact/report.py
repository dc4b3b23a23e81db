"""What a step finds: one line to read and one JSON object, both written as soon as it is known."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

LINES, RESULTS = "results.txt", "results.jsonl"


@dataclass(frozen=True)
class Setting:
    """Where and how large everything is."""

    out: Path  # folder of the results
    device: torch.device
    small: bool  # shapes for a rehearsal

    @property
    def name(self) -> str:
        """What the device calls itself."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"CPU, {torch.get_num_threads()} thread(s)"


@dataclass
class Report:
    """The results of one step."""

    out: Path
    step: str
    start: float = field(default_factory=time.monotonic)
    failed: bool = False

    def tell(self, line: str, *, ok: bool = True, **facts: object) -> None:
        """Print a line, and append it and its facts to the two files."""
        self.failed |= not ok
        seconds = time.monotonic() - self.start
        shown = f"{'ok    ' if ok else 'FAILED'} {self.step:10} {seconds:6.1f} s  {line}"
        found = {"step": self.step, "ok": ok, "seconds": round(seconds, 2), "line": line}
        with (self.out / LINES).open("a") as lines, (self.out / RESULTS).open("a") as results:
            lines.write(f"{shown}\n")
            results.write(json.dumps(found | {"facts": facts}) + "\n")
        print(shown, flush=True)


def told(out: Path, step: str) -> Iterator[dict]:
    """The facts that a step has told so far."""
    path = out / RESULTS
    for line in path.read_text().splitlines() if path.is_file() else ():
        found = json.loads(line)
        if found["step"] == step:
            yield found["facts"]
