"""What a solved linear is: its integers, on an affine grid or on that of a GGUF block type."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vlmq_export.quantizer.kquants import GRIDS, Params


class _Coded:
    """Codes, uint8 [out, in]."""

    codes: torch.Tensor

    @property
    def out_features(self) -> int:
        return self.codes.shape[0]

    @property
    def in_features(self) -> int:
        return self.codes.shape[1]


@dataclass(frozen=True)
class QuantizedLinear(_Coded):
    """The integers of one linear: `weight = scales[:, g_idx] * (codes − zero_points[:, g_idx])`.

    `g_idx[k]` is the group of input column k in the original order. `bias` is the source bias rounded to float16,
    which is what every runtime will add.
    """

    name: str  # hub name of the module: model.layers.0.self_attn.q_proj
    codes: torch.Tensor  # uint8 [out, in]
    scales: torch.Tensor  # float16 [out, groups]
    zero_points: torch.Tensor  # uint8 [out, groups]
    g_idx: torch.Tensor  # int32 [in]
    bias: torch.Tensor | None  # float16 [out]
    bits: int
    group_size: int  # −1: per output channel
    symmetric: bool
    energy: torch.Tensor | None = None  # float32 [in]: mean g²x² of its inputs over the calibration tokens

    @property
    def natural_order(self) -> bool:
        """Whether groups are contiguous in the original column order, so that no `g_idx` is needed."""
        return bool((self.g_idx[1:] >= self.g_idx[:-1]).all())

    def decode(self) -> torch.Tensor:
        """float32 [out, in]; exact but for the one rounding of the product."""
        group = self.g_idx.long()
        return self.scales.float()[:, group] * (self.codes.float() - self.zero_points.float()[:, group])

    def out_of_range(self) -> str:
        """What in the tensors lies outside the grid, or nothing."""
        top, (out_features, groups) = 2**self.bits - 1, self.scales.shape
        if self.codes.shape != (out_features, len(self.g_idx)) or self.zero_points.shape != self.scales.shape:
            return "shapes that do not fit together"
        return _wrong(
            {
                f"codes over {top}": self.codes > top,
                f"zero-points over {top}": self.zero_points > top,
                f"g_idx entries outside 0..{groups - 1}": (self.g_idx < 0) | (self.g_idx >= groups),
                "scales that are not finite": ~torch.isfinite(self.scales),
            }
        )

    def tensors(self) -> dict[str, torch.Tensor]:
        """What the layer's file holds of it, the bias aside."""
        held = {"codes": self.codes, "scales": self.scales, "zero_points": self.zero_points, "g_idx": self.g_idx}
        return held | _energy(self)


@dataclass(frozen=True)
class BlockLinear(_Coded):
    """A linear, embedding or output matrix on the grid of a GGUF block type (kquants.py), in natural column order."""

    name: str  # hub name of the module
    codes: torch.Tensor  # uint8 [out, in]
    params: Params
    bias: torch.Tensor | None  # float16 [out]
    type: str  # of kquants.GRIDS
    energy: torch.Tensor | None = None  # as in QuantizedLinear

    def decode(self) -> torch.Tensor:
        """float32 [out, in], bit for bit what ggml decodes."""
        grid = GRIDS[self.type]
        scale, minimum = (p.repeat_interleave(grid.sub_block, 1) for p in self.params.decoded())
        return grid.decode(self.codes.float(), scale, minimum)

    def at(self, rows: torch.Tensor) -> BlockLinear:
        """Some rows of it, without bias."""
        return BlockLinear(self.name, self.codes[rows], self.params.rows(rows), None, self.type)

    def out_of_range(self) -> str:
        """What in the tensors lies outside the grid, or nothing."""
        grid, p = GRIDS[self.type], self.params
        low, high = grid.scale_limits
        wrong = {
            f"codes over {grid.top}": self.codes > grid.top,
            f"sub-scales outside {low}..{high}": (p.scales < low) | (p.scales > high),
            "scales that are not finite": ~torch.isfinite(p.d),
        }
        if p.dmin is not None and p.mins is not None:
            wrong |= {f"minima over {high}": p.mins > high, "minima that are not finite": ~torch.isfinite(p.dmin)}
        return _wrong(wrong)

    def tensors(self) -> dict[str, torch.Tensor]:
        """What the layer's file holds of it, the bias aside. Sub-scales fit int8, minima uint8."""
        p = self.params
        held = {"codes": self.codes, "d": p.d, "sub_scales": p.scales.to(torch.int8)}
        if p.dmin is not None and p.mins is not None:
            held |= {"dmin": p.dmin, "sub_mins": p.mins.to(torch.uint8)}
        return held | _energy(self)


Linear = QuantizedLinear | BlockLinear


def _energy(linear: Linear) -> dict[str, torch.Tensor]:
    return {} if linear.energy is None else {"energy": linear.energy}


def _wrong(found: dict[str, torch.Tensor]) -> str:
    return ", ".join(f"{int(bad.sum())} {what}" for what, bad in found.items() if bool(bad.any()))
