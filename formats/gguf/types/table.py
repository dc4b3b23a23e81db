"""GGML's tensor types: their numbers, and how many bytes a block of each has.

A block type stores a row in blocks of `block` elements with `nbytes` bytes each. `encode.py` says
what these bytes are, and `decode.py` what they mean.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GGMLType:
    """A tensor type."""

    name: str
    id: int  # ggml_type
    block: int  # elements of a block
    nbytes: int  # bytes of a block
    # general.file_type of a file that is mostly of this type. It is a label that nothing acts on.
    file_type: int | None = None

    @property
    def bits_per_weight(self) -> float:
        """Scales and minima included."""
        return 8 * self.nbytes / self.block

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row. `columns` must be a multiple of the block."""
        return columns // self.block * self.nbytes


TYPES = {
    t.name: t
    for t in (
        GGMLType("F32", 0, 1, 4, 0),
        GGMLType("F16", 1, 1, 2, 1),
        GGMLType("BF16", 30, 1, 2, 32),
        GGMLType("F64", 28, 1, 8),
        GGMLType("I8", 24, 1, 1),
        GGMLType("I16", 25, 1, 2),
        GGMLType("I32", 26, 1, 4),
        GGMLType("I64", 27, 1, 8),
        GGMLType("Q4_0", 2, 32, 18, 2),
        GGMLType("Q4_1", 3, 32, 20, 3),
        GGMLType("Q5_0", 6, 32, 22, 8),
        GGMLType("Q5_1", 7, 32, 24, 9),
        GGMLType("Q8_0", 8, 32, 34, 7),
        GGMLType("Q8_1", 9, 32, 36),
        GGMLType("Q2_K", 10, 256, 84, 10),
        GGMLType("Q3_K", 11, 256, 110, 12),
        GGMLType("Q4_K", 12, 256, 144, 15),
        GGMLType("Q5_K", 13, 256, 176, 17),
        GGMLType("Q6_K", 14, 256, 210, 18),
        GGMLType("Q8_K", 15, 256, 292),
        GGMLType("IQ2_XXS", 16, 256, 66),
        GGMLType("IQ2_XS", 17, 256, 74),
        GGMLType("IQ3_XXS", 18, 256, 98),
        GGMLType("IQ1_S", 19, 256, 50),
        GGMLType("IQ4_NL", 20, 32, 18),
        GGMLType("IQ3_S", 21, 256, 110),
        GGMLType("IQ2_S", 22, 256, 82),
        GGMLType("IQ4_XS", 23, 256, 136),
        GGMLType("IQ1_M", 29, 256, 56),
        GGMLType("TQ1_0", 34, 256, 54, 36),
        GGMLType("TQ2_0", 35, 256, 66, 37),
        GGMLType("MXFP4", 39, 32, 17),
        GGMLType("NVFP4", 40, 64, 36),
        GGMLType("Q1_0", 41, 128, 18),
        GGMLType("Q2_0", 42, 64, 18, 41),
    )
}
BY_ID = {t.id: t for t in TYPES.values()}
