"""The log, on stderr, and the two consoles that everything is printed on."""

from __future__ import annotations

import logging
import os

from rich.console import Console
from rich.logging import RichHandler

from vlmq_export.errors import one_line

out = Console()  # results
err = Console(stderr=True)  # log, progress and errors


class _OneLine(logging.Formatter):
    """Log lines as single lines: they quote names of files and rows, as errors do."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return one_line(super().formatMessage(record))


def set_up_logging(verbosity: int, quiet: bool) -> None:
    """Show our own log alone, at the level that the options ask for."""
    level = logging.ERROR if quiet else logging.DEBUG if verbosity else logging.INFO
    handler = RichHandler(
        console=err,
        show_path=False,
        show_time=False,
        show_level=level <= logging.DEBUG,
        markup=False,
    )
    handler.setFormatter(_OneLine("%(message)s"))
    logger = logging.getLogger("vlmq_export")
    logger.handlers[:] = [handler]
    logger.setLevel(level)
    logger.propagate = False
    quiet_libraries()


def quiet_libraries() -> None:
    """Keep bars and notices of libraries out of our log. Call it before they are imported."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")  # transformers' "Loading weights"
    for name in ("torchao", "torch.utils._pytree", "mobius", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.ERROR)
