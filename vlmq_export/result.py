"""What a run leaves behind."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlmq_export.planning.run_plan import RunPlan
    from vlmq_export.proving.fidelity import Fidelity
    from vlmq_export.proving.parity import Parity
    from vlmq_export.proving.scores import Evaluation


@dataclass
class Result:
    """The outcome of `export` and of `verify`."""

    out: Path  # the output folder
    plan: RunPlan  # what was to be done
    parity: Parity | None = None  # None: the files were not verified
    fidelity: Fidelity | None = None  # None: the model was not compared with its source
    evaluation: Evaluation | None = None  # None: no benchmark was run
    notes: dict[str, list[str]] = field(default_factory=dict)  # format → lines for log and card
    source_bytes: int | None = None  # of the source's weights; None: the source is not at hand
    by_gptqmodel: bool = False  # the GPTQ folder is for GPTQModel.load
    by_vllm: bool = True  # vLLM loads the compressed-tensors folder
    seconds: dict[str, float] = field(default_factory=dict)  # stage → wall time

    @property
    def verified(self) -> bool:
        """Whether every format passed its checks. A run without checks is not verified."""
        return self.parity is not None and self.parity.verified

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Count the wall time of what happens inside to a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = round(time.perf_counter() - start, 1)
