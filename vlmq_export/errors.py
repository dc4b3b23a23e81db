"""The few kinds of error a user can meet. Every message is one line: what is wrong, where, what to do."""


class VlmqError(Exception):
    """Something failed; the command ends with exit code 1."""

    exit_code = 1


class UsageError(VlmqError):
    """An option, recipe key or combination that cannot work; exit code 2."""

    exit_code = 2


class CheckpointError(VlmqError):
    """The source model folder is incomplete, damaged or of a kind we do not support."""


class CalibrationError(VlmqError):
    """A calibration or held-out file, or an image it names, cannot be used."""


class ArtifactError(VlmqError):
    """The artifact folder is incomplete, damaged, or belongs to another run."""


class FormatError(VlmqError):
    """An exported file cannot be written or read."""


class MissingRuntime(VlmqError):
    """A runtime that a check needs is not installed."""


class Interrupted(VlmqError):
    """Stopped by a signal after publishing what was whole; `--resume` continues; exit code 75."""

    exit_code = 75


PARITY_FAILED = 3  # exit code when files were written but a parity gate failed
