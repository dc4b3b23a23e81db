"""Artifacts made in a second by rounding to nearest, for tests of what is written from them."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from vlmq_export.bundled import REFERENCE_VLM
from vlmq_export.quantizer import artifact as store
from vlmq_export.quantizer.checkpoint import Checkpoint
from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.quantizer.families import family_of, text_config
from vlmq_export.quantizer.grids import grid_for
from vlmq_export.quantizer.solver import round_to_nearest

GRIDS = {
    "w4g128": QuantConfig("rtn", 4, 128),
    "w4g32": QuantConfig("rtn", 4, 32),
    "w4g256": QuantConfig("rtn", 4, 256),
    "w4": QuantConfig("rtn", 4, -1),
    "w4g128-sym": QuantConfig("rtn", 4, 128, symmetric=True),
    "w4g128-dynamic": QuantConfig("rtn", 4, 128, act_order="dynamic"),  # a permuted g_idx
    "w3g128": QuantConfig("rtn", 3, 128),
    "w3-sym": QuantConfig("rtn", 3, -1, symmetric=True),
    "w2g128": QuantConfig("rtn", 2, 128),
    "w2": QuantConfig("rtn", 2, -1),
    "w8g128": QuantConfig("rtn", 8, 128, symmetric=True),
}


def rtn_artifact(
    folder: Path, config: QuantConfig, source: Path = REFERENCE_VLM, name: str = "tiny-vlm"
) -> store.Artifact:
    """Every linear rounded to nearest; with act_order "dynamic" in groups of randomly drawn columns."""
    checkpoint = Checkpoint(source)
    family, floats = family_of(checkpoint.config), dict.fromkeys(checkpoint.tensors)
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    draw = torch.Generator().manual_seed(config.seed)
    for layer in range(int(text_config(checkpoint.config)["num_hidden_layers"])):
        solved = []
        for linear in [n for n in family.linear_names(layer + 1) if n.startswith(f"{family.layers}{layer}.")]:
            weight = checkpoint.tensor(f"{linear}.weight").float()
            floats.pop(f"{linear}.weight")
            bias = checkpoint.tensor(f"{linear}.bias").half() if f"{linear}.bias" in floats else None
            floats.pop(f"{linear}.bias", None)
            out_features, columns = weight.shape
            permuted = config.act_order == "dynamic"
            order = torch.randperm(columns, generator=draw) if permuted else torch.arange(columns)
            s = round_to_nearest(weight[:, order], grid_for(config, columns), group=config.group_columns(columns))
            back = order.argsort()
            solved.append(
                store.QuantizedLinear(
                    linear, s.codes[:, back], s.scales, s.zero_points, s.g_idx[back], bias, config.bits, config.group_size,
                    config.symmetric,
                )
            )  # fmt: skip
            records.append(
                store.ModuleRecord(
                    linear,
                    layer,
                    config.bits,
                    config.group_size,
                    config.symmetric,
                    out_features,
                    columns,
                    bias is not None,
                )
            )
        store.write_layer(folder, layer, solved, [r for r in records if r.layer == layer])
    store.write_floats(folder, checkpoint, list(floats))
    store.write_source(folder, checkpoint)
    store.write_manifest(
        folder,
        store.Manifest(
            store.SCHEMA, "test", name, checkpoint.model_type, checkpoint.fingerprint(), config.to_dict(), {}, records
        ),
    )
    return store.Artifact(folder)


def config_of(source: Path) -> dict:
    return json.loads((source / "config.json").read_text("utf-8"))


def edit(file: Path, change) -> None:
    value = json.loads(file.read_text("utf-8"))
    change(value)
    file.chmod(0o644)
    file.write_text(json.dumps(value), "utf-8")
