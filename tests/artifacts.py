"""Artifacts made in a second by rounding to nearest, for the tests of what reads them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from vlmq_export.bundled import REFERENCE_VLM
from vlmq_export.formats.gguf.proof.rows import Exported
from vlmq_export.formats.gguf.tables.layout import Layout
from vlmq_export.formats.proof.checks import CheckSettings
from vlmq_export.formats.proof.weights import Weights
from vlmq_export.quantizer.artifact.manifest import SCHEMA, Manifest, ModuleRecord
from vlmq_export.quantizer.artifact.read import Artifact
from vlmq_export.quantizer.artifact.write import (
    write_floats,
    write_layer,
    write_manifest,
    write_source,
)
from vlmq_export.quantizer.config import BITS, QuantConfig
from vlmq_export.quantizer.grids.affine import grid_for
from vlmq_export.quantizer.grids.linears import QuantizedLinear
from vlmq_export.quantizer.grids.solutions import Solution
from vlmq_export.quantizer.model.architecture import Architecture
from vlmq_export.quantizer.model.checkpoint import Checkpoint
from vlmq_export.quantizer.solver.nearest import round_to_nearest

# Recipes by tag. "dynamic" gives a permuted g_idx.
GRIDS = {
    "w4g128": QuantConfig("rtn", 4, 128),
    "w4g32": QuantConfig("rtn", 4, 32),
    "w4g256": QuantConfig("rtn", 4, 256),
    "w4": QuantConfig("rtn", 4, -1),
    "w4g128-sym": QuantConfig("rtn", 4, 128, symmetric=True),
    "w4g128-dynamic": QuantConfig("rtn", 4, 128, act_order="dynamic"),
    "w3g128": QuantConfig("rtn", 3, 128),
    "w3-sym": QuantConfig("rtn", 3, -1, symmetric=True),
    "w2g128": QuantConfig("rtn", 2, 128),
    "w2": QuantConfig("rtn", 2, -1),
    "w8g128": QuantConfig("rtn", 8, 128, symmetric=True),
}

# Type of scaled rotary positions → the settings that it needs, for heads of 64 columns.
ROPE_KEYS = {
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 512},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
    "longrope": {
        "short_factor": [1.0] * 32,
        "long_factor": [2.0] * 32,
        "original_max_position_embeddings": 512,
    },
}


def mixed(config: QuantConfig, source: Path = REFERENCE_VLM) -> QuantConfig:
    """The recipe with every width somewhere, alike for linears of one input."""
    architecture = Checkpoint(source).architecture
    family, widths = architecture.family, {}
    for layer in range(architecture.layers):
        for i, names in enumerate(architecture.groups(layer)):
            bits = BITS[(layer + i) % len(BITS)]
            widths |= {f"{family.layers}{layer}.{name}": bits for name in names}
    return replace(config, widths=widths)


def rtn_artifact(
    folder: Path, config: QuantConfig, source: Path = REFERENCE_VLM, name: str = "tiny-vlm"
) -> Artifact:
    """An artifact of `source` whose linears are all rounded to nearest.

    With act_order "dynamic" the columns of a group are drawn at random.
    """
    checkpoint = Checkpoint(source)
    family = checkpoint.architecture.family
    folder.mkdir(parents=True, exist_ok=True)
    draw = torch.Generator().manual_seed(config.seed)
    records, taken = [], set()
    for layer in range(checkpoint.architecture.layers):
        prefix = f"{family.layers}{layer}."
        names = [n for n in checkpoint.architecture.linears if n.startswith(prefix)]
        solved = [_rounded(checkpoint, n, config, draw) for n in names]
        found = [ModuleRecord.of(linear, layer, {}) for linear in solved]
        write_layer(folder, layer, solved, found)
        records += found
        taken |= {f"{n}.{part}" for n in names for part in ("weight", "bias")}
    write_floats(folder, checkpoint, [n for n in checkpoint.tensors if n not in taken])
    write_source(folder, checkpoint)
    manifest = Manifest(
        schema=SCHEMA,
        version="test",
        name=name,
        model_type=checkpoint.model_type,
        source=checkpoint.fingerprint(),
        config=config.to_dict(),
        calibration={},
        modules=records,
    )
    write_manifest(folder, manifest)
    return Artifact(folder)


def _rounded(
    checkpoint: Checkpoint, name: str, config: QuantConfig, draw: torch.Generator
) -> QuantizedLinear:
    """One linear of the checkpoint on the grid of the recipe."""
    weight = checkpoint.tensor(f"{name}.weight").float()  # [out, in]
    columns, config = weight.shape[1], config.of(name)
    permuted = config.act_order == "dynamic"
    order = torch.randperm(columns, generator=draw) if permuted else torch.arange(columns)
    grid, group = grid_for(config, columns), config.group_columns(columns)
    s = round_to_nearest(weight[:, order], grid, group=group)
    back = order.argsort()
    solution = Solution(s.codes[:, back], s.scales, s.zero_points, s.g_idx[back])
    bias = None
    if f"{name}.bias" in checkpoint.tensors:
        bias = checkpoint.tensor(f"{name}.bias").half()
    return QuantizedLinear(name, solution, bias, config.bits, config.group_size, config.symmetric)


def tower_of(
    artifact: Artifact, dtype: str = "f16", class_row: str = "last"
) -> dict[str, np.ndarray]:
    """The tensors that the mmproj of an artifact must hold: GGUF name → values."""
    layout = Layout.of(artifact.architecture, class_row, artifact.source)
    reference = SimpleNamespace(weights=Weights(artifact.path))
    export = Exported(Path(), Path(), layout, {}, dtype, reference, CheckSettings())
    return dict(export.tower())


def config_of(source: Path) -> dict:
    """The config.json of a model folder."""
    return json.loads((source / "config.json").read_text("utf-8"))


def architecture_of(source: Path) -> Architecture:
    return Architecture.of(config_of(source))


def edit(file: Path, change: Callable[[Any], object]) -> None:
    """Let `change` work on the value of a JSON file, in place. The file may be read-only."""
    value = json.loads(file.read_text("utf-8"))
    change(value)
    file.chmod(0o644)
    file.write_text(json.dumps(value), "utf-8")
