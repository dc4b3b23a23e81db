"""From the MODEL that a user names to the source that it is."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

from vlmq_export import bundled
from vlmq_export.errors import CheckpointError, VlmqError
from vlmq_export.formats.gptq.imports.checkpoint import GptqCheckpoint
from vlmq_export.formats.gptq.imports.scheme import quantization_of
from vlmq_export.quantizer.artifact.manifest import MANIFEST
from vlmq_export.quantizer.artifact.read import Artifact
from vlmq_export.quantizer.model.checkpoint import Checkpoint
from vlmq_export.sources.float_model import FloatModel
from vlmq_export.sources.gptq_model import GptqModel
from vlmq_export.sources.origin import Origin
from vlmq_export.sources.saved_artifact import SavedArtifact
from vlmq_export.sources.source import Source


def open_source(model: str | None) -> Source:
    """What MODEL is. Headers and settings are read, and no weight.

    Raises CheckpointError or ArtifactError for what cannot be opened.
    """
    path = locate_model(model)
    if (path / MANIFEST).is_file():
        return SavedArtifact(path, Artifact(path))
    origin = Origin("reference-vlm") if model is None else Origin.of(path)
    checkpoint = _open_checkpoint(path)
    if isinstance(checkpoint, GptqCheckpoint):
        return GptqModel(path, origin, checkpoint)
    return FloatModel(path, origin, checkpoint)


def locate_model(model: str | None, *, download: bool = True) -> Path:
    """The folder of MODEL: a local one, the bundled one, or a snapshot of a hub id.

    A snapshot comes from the cache, or from the network where that is allowed.
    """
    if model is None:
        return bundled.REFERENCE_VLM
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{model}: is a file, and a model is a folder; {_instead(path)}")
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise CheckpointError(f"{model}: no such model folder{_meant(model)}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    kinds = ["*.json", "*.safetensors", "*.txt", "*.jinja", "LICENSE*", "README.md"]
    try:
        return Path(snapshot_download(model, allow_patterns=kinds, local_files_only=not download))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as e:
        first = str(e).strip().splitlines()[0]
        raise CheckpointError(
            f"{model}: neither a local folder nor to be had from the hub ({first}){_meant(model)}"
        ) from None


def _instead(file: Path) -> str:
    """What to give in place of a single file."""
    if file.suffix == ".gguf":
        return "from GGUF there is no way back, give the float model that it was made of"
    return f"give {file.parent}"


def _meant(model: str) -> str:
    """A guess at what a name that leads nowhere was meant to be; empty without one."""
    if "huggingface.co/" in model:
        name = "/".join(model.partition("huggingface.co/")[2].split("/")[:2])
        return f"; a repository of the hub is given as {name}"
    path = Path(model).expanduser()
    there = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
    close = get_close_matches(path.name, there, n=1)
    return f"; did you mean {path.parent / close[0]}?" if close else ""


def same_source(model: str | None, artifact: Artifact) -> Path | None:
    """The folder of MODEL if it is still at hand and still what was quantized; else None."""
    try:
        # The recipe beside an artifact may be anybody's, so nothing is fetched for it.
        path = locate_model(model, download=False)
        same = _open_checkpoint(path).fingerprint() == artifact.manifest.source
        return path if same else None
    except VlmqError:
        return None


def _open_checkpoint(path: Path) -> Checkpoint:
    """A float checkpoint, or one that others quantized with GPTQ."""
    return Checkpoint(path) if quantization_of(path) is None else GptqCheckpoint(path)
