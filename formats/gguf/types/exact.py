"""Which GGUF block type holds a grid exactly, and how its integers are stored there.

`scale · (code − zero_point)` must come out to the last bit, in every decoder. With s the scale, z
the zero-point and q the codes of the grid:

    grid                                           type    stored as                     bits/weight
    8 bits, symmetric                              Q8_0    q − z                         8.5
    4 bits, symmetric                              Q4_0    q − z + 8                     4.5
    4 bits, groups of 256k                         Q4_K    d = dmin = s, scale 1, min z  4.5
    4 bits, other groups, s·z exact in float16     Q4_1    d = s, m = −s·z               5.0
    4 bits, other groups, any s                    Q5_0    q − z + 16                    5.5
    3 bits, symmetric, groups of 256k              Q3_K    d = s, scale 1, q − z + 4     3.4375
    3 bits, asymmetric, groups of 256k             Q4_K    as above                      4.5
    2 bits, groups of 256k                         Q2_K    d = dmin = s, scale 1, min z  2.625
    2 bits, groups of 256k, every z in {1, 2}      TQ2_0   z = 1: d = s, q               2.0625
                                                           z = 2: d = −s, 3 − q
    2 or 3 bits, other groups of 32k               Q4_0    q − z + 8                     4.5

Groups of 256k have a multiple of 256 columns; with a group size of −1, a group is a row. 8 bits
asymmetric have no type, because q − z needs nine bits. Q2_0 (64 elements, 2.25 bits per weight)
would hold 2-bit groups of 64k with zero-points in {1, 2}. It is not used, because gguf-py 0.19
cannot read a file that contains it.
"""

from __future__ import annotations

import numpy as np

from vlmq_export.errors import FormatError
from vlmq_export.formats.gguf.types.encode import Blocks, pack_blocks
from vlmq_export.formats.gguf.types.table import TYPES
from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.quantizer.grids.blocks import GRIDS
from vlmq_export.quantizer.grids.choice import vision_block
from vlmq_export.quantizer.grids.linears import BlockLinear, Linear, QuantizedLinear


def grid_home(
    bits: int,
    symmetric: bool,
    columns: int,  # of a group
    *,
    portable: bool,  # whether every scale · zero_point is exact in float16
    ternary: bool,  # whether every zero-point is 1 or 2
) -> str | None:
    """The cheapest block type that is exact, or None where there is none."""
    if columns % 32:
        return None
    super_block = columns % 256 == 0
    if bits == 8:
        return "Q8_0" if symmetric else None
    if bits == 4:
        if symmetric:
            return "Q4_0"
        return "Q4_K" if super_block else "Q4_1" if portable else "Q5_0"
    if bits == 3:
        return "Q4_0" if not super_block else "Q3_K" if symmetric else "Q4_K"
    if bits == 2:
        return "Q4_0" if not super_block else "TQ2_0" if ternary else "Q2_K"
    return None


def planned_home(config: QuantConfig, in_features: int) -> str | None:
    """The block type of a linear before its integers are known, or None where none is exact.

    Scales are taken to be portable. The zero-points of a symmetric 2-bit grid are all 2, and those
    of an asymmetric one are taken to be any.
    """
    columns = config.group_columns(in_features)
    return grid_home(
        config.bits, config.symmetric, columns, portable=True, ternary=config.symmetric
    )


def tower_home(config: QuantConfig, in_features: int) -> str | None:
    """The block type of a linear of the vision tower, likewise."""
    return vision_block(config, in_features) or planned_home(config.vision, in_features)


def why_homeless(name: str, config: QuantConfig, in_features: int) -> str:
    """One line on a linear for which `planned_home` is None."""
    if config.bits == 8 and not config.symmetric:
        return "8 bits asymmetric has no exact GGUF type; use --sym, or --bits 4"
    if config.group_size == -1:
        return (
            f"{name} has rows of {in_features} columns, not a multiple of 32; GGUF cannot hold this"
            " layer quantized"
        )
    return (
        f"groups of {config.group_size} columns are not a multiple of 32; use --group-size 32, 64"
        " or 128"
    )


def home_of(linear: Linear) -> str:
    """The cheapest block type that is exact for the integers of a linear.

    Raises FormatError that names the linear and the option to change where there is none.
    """
    if isinstance(linear, BlockLinear):
        return linear.type
    _require_natural_order(linear)
    scales, zeros = linear.solution.scales.numpy(), linear.solution.zero_points.numpy()
    columns = linear.in_features if linear.group_size == -1 else linear.group_size
    home = grid_home(
        linear.bits,
        linear.symmetric,
        columns,
        portable=_portable(scales, zeros),
        ternary=bool(((zeros == 1) | (zeros == 2)).all()),
    )
    if home is None:
        config = QuantConfig(
            bits=linear.bits, group_size=linear.group_size, symmetric=linear.symmetric
        )
        raise FormatError(f"{linear.name}: {why_homeless(linear.name, config, linear.in_features)}")
    return home


def pack_linear(linear: Linear, home: str) -> np.ndarray:
    """A linear in blocks of the type `home`, uint8 [out, bytes of a row].

    A row whose last group is short is filled up with codes that decode to zero.

    Raises FormatError where the integers do not fit the type.
    """
    if isinstance(linear, BlockLinear):
        return _pack_native(linear)
    _require_natural_order(linear)
    t, solution = TYPES[home], linear.solution
    short = -linear.in_features % t.block  # what the last group of a row of the tower may lack
    columns = linear.in_features + short
    per_group = columns // solution.scales.shape[1] // t.block  # blocks of a group
    d = np.repeat(solution.scales.numpy(), per_group, axis=1).reshape(-1)
    z = np.repeat(solution.zero_points.numpy().astype(np.int16), per_group, axis=1).reshape(-1)
    q = solution.codes.numpy().astype(np.int16)
    if short:
        zeros = np.repeat(solution.zero_points.numpy().astype(np.int16)[:, -1:], short, axis=1)
        q = np.concatenate([q, zeros], axis=1)
    try:
        packed = pack_blocks(home, _blocks(home, d, z, q.reshape(-1, t.block)))
        return packed.reshape(linear.out_features, t.row_bytes(columns))
    except (ValueError, OverflowError) as e:
        raise FormatError(
            f"{linear.name}: cannot be stored as {home} ({e}); the artifact does not fit its own"
            " grid"
        ) from None


def _pack_native(linear: BlockLinear) -> np.ndarray:
    """A linear that was solved on a block type, in blocks of that type: its fields as they are."""
    t = TYPES[linear.type]
    blocks = _native_blocks(linear, t.block)
    try:
        packed = pack_blocks(linear.type, blocks)
    except ValueError as e:
        raise FormatError(f"{linear.name}: {e}; the artifact does not fit its own grid") from None
    return packed.reshape(linear.out_features, t.row_bytes(linear.in_features))


def _native_blocks(linear: BlockLinear, block: int) -> Blocks:
    """The fields of a linear that was solved on a block type, as the type stores them.

    Q3_K and IQ4_XS store a scale plus 32, Q6_K stores it as int8, and Q8_0 stores codes as int8.
    The solver subtracts a minimum; the 32-blocks add m, which is its negative. On a lattice the
    scales are odd, and c is stored for 2c + 1.
    """
    grid, p = GRIDS[linear.type], linear.params
    codes = linear.solution.codes.numpy().reshape(-1, block)
    if linear.type == "Q8_0":
        codes = (codes.astype(np.int16) - grid.centre).astype(np.int8)
    d = p.d.numpy().reshape(-1)
    m = None if p.dmin is None else p.dmin.numpy().reshape(-1)
    sub_blocks = block // grid.sub_block
    if sub_blocks == 1:
        return Blocks(d, codes, None if m is None else -m)
    shift = 32 if linear.type in ("Q3_K", "IQ4_XS") else 0
    scales = p.scales.numpy().reshape(-1, sub_blocks) + shift
    if grid.lattice is not None:
        scales = scales >> 1
    if linear.type == "Q6_K":
        scales = scales.astype(np.int8).view(np.uint8)
    mins = None if p.mins is None else p.mins.numpy().reshape(-1, sub_blocks).astype(np.uint8)
    return Blocks(d, codes, m, scales.astype(np.uint8), mins)


def _blocks(home: str, d: np.ndarray, z: np.ndarray, q: np.ndarray) -> Blocks:
    """The fields of n blocks of the type `home`, for integers on an affine grid.

    d: scales, float16 [n].
    z: zero-points, int16 [n].
    q: codes, int16 [n, block].

    Raises ValueError where the integers do not fit the type.
    """
    if home in ("Q4_0", "Q5_0", "Q3_K", "Q8_0"):
        middle = {"Q4_0": 8, "Q5_0": 16, "Q3_K": 4, "Q8_0": 0}[home]
        codes = _narrow(q - z[:, None] + middle, np.int8 if home == "Q8_0" else np.uint8)
        # A scale of 1 is stored as 33.
        ones = np.full((len(d), 16), 33, np.uint8) if home == "Q3_K" else None
        return Blocks(d, codes, scales=ones)
    if home == "Q4_1":
        offset = (-d.astype(np.float32) * z).astype(np.float16)
        if not _portable(d[:, None], z[:, None]):
            raise ValueError("scale times zero-point is not exact in float16")
        return Blocks(d, _narrow(q, np.uint8), offset)
    if home in ("Q2_K", "Q4_K"):
        sub_blocks = 16 if home == "Q2_K" else 8
        ones = np.ones((len(d), sub_blocks), np.uint8)
        mins = np.repeat(_narrow(z, np.uint8)[:, None], sub_blocks, axis=1)
        return Blocks(d, _narrow(q, np.uint8), d, ones, mins)
    if home == "TQ2_0":
        if not np.isin(z, (1, 2)).all():
            raise ValueError("a zero-point is neither 1 nor 2")
        flipped = z == 2
        codes = np.where(flipped[:, None], 3 - q, q)
        return Blocks(np.where(flipped, -d, d), _narrow(codes, np.uint8))
    raise ValueError("no grid of ours is stored in this type")


def _require_natural_order(linear: QuantizedLinear) -> None:
    """Raises FormatError where the groups of a linear are not runs of neighbouring columns."""
    own = linear.in_features if linear.group_size == -1 else linear.group_size
    if not np.array_equal(linear.solution.g_idx.numpy(), np.arange(linear.in_features) // own):
        raise FormatError(
            f"{linear.name}: groups are not contiguous columns, and GGUF has no g_idx; quantize"
            " with --act-order gar, static or off"
        )


def _portable(scales: np.ndarray, zeros: np.ndarray) -> bool:
    """Whether every scale · zero_point is exact in float16."""
    product = scales.astype(np.float32) * zeros.astype(np.float32)
    with np.errstate(over="ignore"):
        return bool((product.astype(np.float16).astype(np.float32) == product).all())


def _narrow(x: np.ndarray, dtype: type) -> np.ndarray:
    """Integers cast to a narrower type. Raises ValueError where one does not fit."""
    info = np.iinfo(dtype)
    if x.size and (x.min() < info.min or x.max() > info.max):
        raise ValueError(f"values {x.min()}..{x.max()} do not fit {np.dtype(dtype).name}")
    return x.astype(dtype)
