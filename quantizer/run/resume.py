"""Decides whether a folder belongs to this run.

run.json stores everything that affects the bytes of the output. Resuming with anything else is
refused.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from vlmq_export._version import __version__
from vlmq_export.errors import ArtifactError
from vlmq_export.quantizer.artifact.manifest import MANIFEST, SCHEMA, layer_file
from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.quantizer.model.checkpoint import Checkpoint
from vlmq_export.quantizer.samples.sample import Sample
from vlmq_export.quantizer.storage.untrusted import read_json
from vlmq_export.quantizer.storage.whole_files import write_json

RUN = "run.json"  # what decides the bytes of the run that a folder belongs to
WHOLE = -1  # takes the place of a number of layers where the folder has its manifest


def identity(
    checkpoint: Checkpoint,
    samples: Sequence[Sample],
    config: QuantConfig,
    calibration: dict,
    device: torch.device,
    ranks: int,
) -> dict:
    """Everything that decides the bytes of a run, as run.json stores it."""
    import transformers

    digest = hashlib.sha256()
    for sample in samples:
        digest.update(sample.input_ids.numpy().tobytes())
        if sample.pixel_values is not None:
            digest.update(sample.pixel_values.numpy().tobytes())
    decides = {
        "schema": SCHEMA,
        "vlmq-export": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "config": config.to_dict(),
        "source": checkpoint.fingerprint(),
        "calibration": calibration,
        "samples": digest.hexdigest(),
        "ranks": ranks,
    }
    return json.loads(json.dumps(decides))


def claim(folder: Path, identity: dict, resume: bool) -> int:
    """Make the folder this run's. What a killed run left half-written in it is removed.

    Returns how many layers the folder holds already, or WHOLE if it has its manifest. Raises
    ArtifactError for a folder that belongs to another run, or that has files and is not resumed.
    """
    file = folder / RUN
    if not resume and folder.is_dir() and any(folder.iterdir()):
        raise ArtifactError(
            f"{folder} holds files of an earlier run; resume it or choose another folder"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob(".*.tmp"):
        shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
    if not file.is_file():
        if any(folder.iterdir()):
            raise ArtifactError(
                f"{folder} has no {RUN}, so it cannot be resumed; choose another folder"
            )
        write_json(file, identity)
        return 0
    before = read_json(file, error=ArtifactError)
    if changed := [key for key in identity if before.get(key) != identity[key]]:
        told = (_difference(key, before.get(key), identity[key]) for key in changed)
        details = "; ".join(filter(None, told))
        raise ArtifactError(
            f"{folder} was begun with another {' and '.join(changed)} ({details});"
            " give the same, or start again"
        )
    if (folder / MANIFEST).is_file():
        return WHOLE
    layers = 0
    while (folder / layer_file(layers)).is_file():
        layers += 1
    return layers


def _difference(name: str, before: object, now: object) -> str:
    """What changed, in a few words. Of a dict only the keys that changed are told, each with its
    values where these are short."""
    if isinstance(before, dict) and isinstance(now, dict):
        changed = [k for k in before | now if before.get(k) != now.get(k)]
        return ", ".join(_difference(k, before.get(k), now.get(k)) for k in changed)
    short = all(len(str(value)) <= 40 for value in (before, now))
    return f"{name} was {before}, now {now}" if short else f"{name} has other contents"
