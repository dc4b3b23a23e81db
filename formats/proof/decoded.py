"""The reference's weights as a checkpoint, for a model that is read part by part.

The reference of the proof is a whole model in memory. A model that is larger than the machine has
the same weights, decoded by the same code, one part at a time.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from vlmq_export.errors import CheckpointError
from vlmq_export.formats.proof.weights import Weights
from vlmq_export.quantizer.model.architecture import Architecture
from vlmq_export.quantizer.storage.tensors import TensorInfo


class DecodedCheckpoint:
    """A `WeightFiles` of decoded weights, all of them float32."""

    def __init__(self, weights: Weights, folder: Path):
        self.path = folder  # with the config.json that the weights are for
        self.weights = weights
        self.written_config = json.loads((folder / "config.json").read_text("utf-8"))
        self.architecture = Architecture.of(self.written_config)
        self.tensors = {
            name: TensorInfo(name, weights.shape(name), "F32", "") for name in weights.names()
        }

    def info(self, name: str) -> TensorInfo:
        """Name and shape of a weight. Raises CheckpointError for a name that is not there."""
        if name not in self.tensors:
            raise CheckpointError(f"{self.path}: tensor {name} is missing")
        return self.tensors[name]

    def tensor(self, name: str, rows: Sequence[int] | None = None) -> torch.Tensor:
        """A weight by its hub name, or some of its rows, float32."""
        return torch.from_numpy(self.weights.array(name, rows))
