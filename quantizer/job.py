"""What one run works on, with everything that the recipe names looked up once."""

from __future__ import annotations

from dataclasses import dataclass, replace

from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.quantizer.grids.choice import GridChoice, grid_choice, vision_choice
from vlmq_export.quantizer.methods import Method, method_named
from vlmq_export.quantizer.model.architecture import Architecture
from vlmq_export.quantizer.model.families import Family, SubBlock


@dataclass(frozen=True)
class Job:
    """A recipe, the method that it names, and the model that it is for."""

    config: QuantConfig
    method: Method
    architecture: Architecture
    head: str  # hub name of the output matrix, if the recipe quantizes it and it is the model's own

    @classmethod
    def of(cls, architecture: Architecture, config: QuantConfig) -> Job:
        """What a recipe asks of a model. Raises UsageError for an unknown method.

        A mix of block types may name a type for the output matrix. Where that matrix is the
        embedding too, one tensor serves both, and nothing calibrates it.
        """
        head = architecture.family.head
        own = config.head_bits or (head in config.types and not architecture.tied)
        return cls(config, method_of(config), architecture, head if own else "")

    @property
    def smooth(self) -> bool:
        """Whether the input channels of the decoder's linears are scaled for the least error."""
        return self.config.smooth and self.method.solves

    def scales(self, block: SubBlock) -> bool:
        """Whether the norm of a sub-block takes a scale, and so do the floats that read it."""
        return bool(self.method.scaling) or (self.smooth and block.kind != "experts")

    @property
    def family(self) -> Family:
        """Where the model keeps its layers and projections."""
        return self.architecture.family

    @property
    def outer(self) -> list[str]:
        """Hub names of the matrices outside the layers that are quantized, uncalibrated."""
        calibrated = {*self.linears, self.head}
        if self.config.embedding_bits:
            return [self.family.embedding]
        return [name for name in self.config.types if name not in calibrated]

    @property
    def layers(self) -> int:
        """Decoder layers."""
        return self.architecture.layers

    @property
    def linears(self) -> list[str]:
        """Hub names of the decoder's linears, in the order in which they are solved."""
        return self.architecture.linears

    def groups(self, layer: int) -> list[tuple[str, ...]]:
        """Linears of a layer that share one input, in the order in which they are quantized."""
        return self.architecture.groups(layer)

    def prefix(self, layer: int) -> str:
        """Hub name of a decoder layer, with the dot behind it."""
        return f"{self.family.layers}{layer}."

    def grid(self, name: str, in_features: int) -> GridChoice:
        """The grid of one matrix, by its hub name."""
        if self.family.is_vision(name):
            return vision_choice(self.config, in_features)
        return grid_choice(self.config, name, in_features)


def method_of(config: QuantConfig) -> Method:
    """The method that a recipe names, tuned where it asks for that.

    Raises UsageError for an unknown name.
    """
    return replace(method_named(config.method), tuned=config.tune > 0)
