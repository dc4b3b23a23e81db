"""What a model is called in files and cards, and which repository of the hub it came from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_CACHED = "models--"  # how huggingface_hub begins the name of a model's folder in its cache


@dataclass(frozen=True)
class Origin:
    """Where a model is from."""

    name: str  # for files
    repository: str = ""  # on the hub, ORG/NAME; empty for a folder of the user's own
    revision: str = ""  # the commit of that repository

    @classmethod
    def of(cls, folder: Path) -> Origin:
        """The origin of a model folder.

        A snapshot in the hub's cache is models--ORG--NAME/snapshots/REVISION. Its own name says
        nothing to a reader, so that the name is taken from the repository. Any other folder is
        called by its own name.
        """
        folder = folder.resolve()
        cached = folder.parent.parent.name
        if folder.parent.name != "snapshots" or not cached.startswith(_CACHED):
            return cls(folder.name)
        parts = cached.removeprefix(_CACHED).split("--")  # the hub allows no such dashes in a name
        return cls(parts[-1], "/".join(parts), folder.name)
