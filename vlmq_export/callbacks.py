"""How a run talks to whoever started it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Progress = Callable[[str, int, int], None]  # stage, steps done, steps in all


@dataclass(frozen=True)
class Callbacks:
    """What a run calls between its steps. Both do nothing unless they are given."""

    progress: Progress = lambda *_: None
    should_stop: Callable[[], bool] = lambda: False  # whether the run should end here
