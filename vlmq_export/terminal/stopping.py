"""SIGTERM and Ctrl-C: a stop that can be resumed, and an answer at once.

Python runs a handler between two steps of its own. A factorization or a child process may keep it
from that for a long time. The answer therefore comes from a thread, which the operating system's
handler wakes through a pipe.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable

from vlmq_export.errors import CTRL_C, Interrupted
from vlmq_export.terminal.log import err

STOPS = (signal.SIGTERM, signal.SIGINT)
# Seconds that a second signal leaves the run to clean up, where it is not stuck in native code.
GRACE = 5.0


class StopSignals:
    """SIGTERM and Ctrl-C ask for a stop after the layer in hand. A second one stops at once.

    Either way the run can be resumed.

    doing: says what is in hand, for the answer: `finishing layer 3 of 8`.
    tells: whether this process answers. Of those that torchrun started, one does.
    again: how the command goes on after a stop.
    """

    def __init__(
        self, doing: Callable[[], str], *, tells: bool = True, again: str = "continue with --resume"
    ):
        self.doing, self.tells, self.again = doing, tells, again
        self.number: int | None = None  # of the first signal
        self.raised = False  # by the second one, once

    def __enter__(self) -> StopSignals:
        self.over = threading.Event()
        reader, self.writer = os.pipe()
        os.set_blocking(self.writer, False)
        self.before = {s: signal.signal(s, self._ask) for s in STOPS}
        self.woken = signal.set_wakeup_fd(self.writer, warn_on_full_buffer=False)
        self.watch = threading.Thread(target=self._watch, args=(reader,), daemon=True)
        self.watch.start()
        return self

    def __call__(self) -> bool:
        """Whether a stop was asked for."""
        return self.number is not None

    def _ask(self, number: int, _frame: object) -> None:
        """The handler of both signals, in the main thread."""
        if self.number is None:
            self.number = number
        elif not self.raised:
            self.raised = True
            raise KeyboardInterrupt

    def _watch(self, reader: int) -> None:
        """Answer each signal, in a thread. The pipe has a byte for each, its number."""
        asked = 0
        with os.fdopen(reader, "rb", buffering=0) as pipe:
            while numbers := pipe.read(1):
                if numbers[0] not in STOPS:
                    continue
                asked += 1
                if asked == 1:
                    again = "press Ctrl-C" if numbers[0] == signal.SIGINT else "send it"
                    self._say(f"{self.doing()}; {again} again to stop now")
                elif asked == 2 and not self.over.wait(GRACE):
                    # The main thread is in native code, which nothing interrupts. What is on disk
                    # is whole, as after kill -9.
                    self._say(f"stopped at once; {self.again}")
                    os._exit(_exit_code(numbers[0]))

    def _say(self, line: str) -> None:
        if self.tells:
            err.print(line, highlight=False, markup=False, soft_wrap=True)

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        self.over.set()
        signal.set_wakeup_fd(self.woken)
        for number, handler in self.before.items():
            signal.signal(number, handler)
        os.close(self.writer)
        self.watch.join()
        if isinstance(error, KeyboardInterrupt):
            error = Interrupted(f"stopped at once; {self.again}")
        if isinstance(error, Interrupted):
            error.exit_code = _exit_code(self.number)
            raise error from None


def _exit_code(number: int | None) -> int:
    """The exit code after a stop by this signal."""
    return CTRL_C if number == signal.SIGINT else Interrupted.exit_code
