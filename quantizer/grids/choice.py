"""Which grid a matrix of the model gets, by the recipe: the one place where that is decided."""

from __future__ import annotations

from dataclasses import dataclass

from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.quantizer.grids.affine import Affine, grid_for
from vlmq_export.quantizer.grids.blocks import GRIDS, BlockGrid


@dataclass(frozen=True)
class GridChoice:
    """The grid of one matrix, and how the column loop walks over it."""

    grid: Affine | BlockGrid
    group: int  # columns that are fitted together: a group, or a block
    group_size: int  # as the recipe says it: −1 is one scale per output channel
    act_order: str

    @property
    def together(self) -> int:
        """Columns that are rounded at once."""
        return self.grid.together if isinstance(self.grid, BlockGrid) else 1

    @property
    def stepped(self) -> int:
        """Columns that share a distance between codes."""
        return self.grid.sub_block if isinstance(self.grid, BlockGrid) else self.group

    @property
    def rounded_inputs(self) -> int:
        """Inputs that the runtime rounds to 8 bits with one scale; 0 where it rounds none."""
        return self.grid.rounded_inputs if isinstance(self.grid, BlockGrid) else 0

    @property
    def block_type(self) -> str:
        """Name of the GGUF block type; empty on an affine grid."""
        return self.grid.name if isinstance(self.grid, BlockGrid) else ""


def grid_choice(config: QuantConfig, name: str, in_features: int) -> GridChoice:
    """`name` is the hub name of the matrix."""
    if kind := config.types.get(name):
        return _of_blocks(kind, config)
    return _affine(config.of(name), in_features)


def vision_choice(config: QuantConfig, in_features: int) -> GridChoice:
    """The grid of a linear of the vision tower or the projector."""
    if kind := vision_block(config, in_features):
        return _of_blocks(kind, config)
    return _affine(config.vision, in_features)


def vision_block(config: QuantConfig, in_features: int) -> str:
    """The block type of a linear of the vision tower or the projector; empty on an affine grid."""
    kind = config.vision_type
    return kind if kind and in_features % GRIDS[kind].block == 0 else ""


def _of_blocks(kind: str, config: QuantConfig) -> GridChoice:
    grid = GRIDS[kind]
    # The columns of a block stay together, whichever order was asked for.
    order = "off" if config.act_order == "off" else "gar"
    return GridChoice(grid, grid.block, config.group_size, order)


def _affine(config: QuantConfig, in_features: int) -> GridChoice:
    columns = config.group_columns(in_features)
    return GridChoice(grid_for(config, in_features), columns, config.group_size, config.act_order)
