"""Which GGUF block type holds a grid exactly: `scale · (code − zero_point)` to the last bit, in every decoder.

    grid                                             home     how it is stored                       bits per weight
    8 bits, symmetric                                Q8_0     q − z                                       8.5
    4 bits, symmetric                                Q4_0     q − z + 8                                   4.5
    4 bits, groups of 256k (or such rows)            Q4_K     d = dmin = s, scale 1, min z                4.5
    4 bits, other groups, every s·z exact in fp16    Q4_1     d = s, m = −s·z                             5.0
    4 bits, other groups, any s                      Q5_0     q − z + 16                                  5.5
    3 bits, symmetric, groups of 256k                Q3_K     d = s, scale 1 (stored 33), q − z + 4       3.4375
    3 bits, asymmetric, groups of 256k               Q4_K     as above                                    4.5
    2 bits, groups of 256k                           Q2_K     d = dmin = s, scale 1, min z                2.625
    2 bits, groups of 256k, every z in {1, 2}        TQ2_0    z = 1: d = s, q; z = 2: d = −s, 3 − q       2.0625
    2 or 3 bits, other groups of 32k                 Q4_0     q − z + 8                                   4.5

8 bits asymmetric has no home: q − z needs nine bits. Q2_0 (64 elements, 2.25 bits) would hold 2-bit groups of 64k with
zero-points in {1, 2}, but gguf-py 0.19 cannot read a file that contains it, so it is not used.
"""

from __future__ import annotations

import numpy as np

from vlmq_export.errors import FormatError
from vlmq_export.formats.gguf.types import TYPES, Blocks, pack_blocks
from vlmq_export.quantizer.artifact import BlockLinear, Linear, QuantizedLinear
from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.quantizer.kquants import GRIDS


def grid_home(bits: int, symmetric: bool, columns: int, *, portable: bool, ternary: bool) -> str | None:
    """Name of the block type for groups of `columns` columns, or None where no type is exact.

    `portable`: every scale · zero_point is exact in float16. `ternary`: every zero-point is 1 or 2.
    """
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
    """The home before the integers are known: portable scales, and 2-bit zero-points as the grid fixes them."""
    columns = config.group_columns(in_features)
    return grid_home(config.bits, config.symmetric, columns, portable=True, ternary=config.symmetric)


def why_homeless(name: str, config: QuantConfig, in_features: int) -> str:
    """One line on a grid for which `planned_home` is None."""
    if config.bits == 8 and not config.symmetric:
        return "8 bits asymmetric has no exact GGUF type; use --sym, or --bits 4"
    if config.group_size == -1:
        return f"{name} has rows of {in_features} columns, not a multiple of 32; GGUF cannot hold this layer quantized"
    return f"groups of {config.group_size} columns are not a multiple of 32; use --group-size 32, 64 or 128"


def home_of(linear: Linear) -> str:
    """The cheapest exact type for these integers. Raises FormatError naming the linear and the option to change."""
    if isinstance(linear, BlockLinear):
        return linear.type
    _natural(linear)
    scales, zeros = linear.scales.numpy(), linear.zero_points.numpy()
    columns = linear.in_features if linear.group_size == -1 else linear.group_size
    home = grid_home(
        linear.bits, linear.symmetric, columns, portable=_portable(scales, zeros), ternary=bool(((zeros == 1) | (zeros == 2)).all())
    )  # fmt: skip
    if home is None:
        config = QuantConfig(bits=linear.bits, group_size=linear.group_size, symmetric=linear.symmetric)
        raise FormatError(f"{linear.name}: {why_homeless(linear.name, config, linear.in_features)}")
    return home


def pack_linear(linear: Linear, home: str) -> np.ndarray:
    """uint8 [out, row bytes] of one linear. Raises FormatError when the integers do not fit `home`."""
    if isinstance(linear, BlockLinear):
        return _pack_native(linear)
    _natural(linear)
    t = TYPES[home]
    per_group = linear.in_features // linear.scales.shape[1] // t.block
    d = np.repeat(linear.scales.numpy(), per_group, axis=1).reshape(-1)  # [out · blocks of a row]
    z = np.repeat(linear.zero_points.numpy().astype(np.int16), per_group, axis=1).reshape(-1)
    q = linear.codes.numpy().astype(np.int16).reshape(-1, t.block)
    try:
        blocks = _blocks(home, d, z, q)
        return pack_blocks(home, blocks).reshape(linear.out_features, t.row_bytes(linear.in_features))
    except (ValueError, OverflowError) as e:
        raise FormatError(
            f"{linear.name}: cannot be stored as {home} ({e}); the artifact does not fit its own grid"
        ) from None


def _pack_native(linear: BlockLinear) -> np.ndarray:
    """A linear that was solved on this very type: its fields as they are."""
    t, grid, p = TYPES[linear.type], GRIDS[linear.type], linear.params
    d, codes = p.d.numpy().reshape(-1), linear.codes.numpy().reshape(-1, t.block)
    subs = t.block // grid.sub_block
    scales = mins = m = None
    if subs > 1:
        stored = p.scales.numpy().reshape(-1, subs) + (32 if linear.type == "Q3_K" else 0)
        scales = stored.astype(np.int8).view(np.uint8) if linear.type == "Q6_K" else stored.astype(np.uint8)
    if p.dmin is not None:
        m = p.dmin.numpy().reshape(-1)
        m, mins = (m, p.mins.numpy().reshape(-1, subs).astype(np.uint8)) if subs > 1 else (-m, None)
    if linear.type == "Q8_0":
        codes = (codes.astype(np.int16) - grid.centre).astype(np.int8)
    try:
        packed = pack_blocks(linear.type, Blocks(d, codes, m, scales, mins))
    except ValueError as e:
        raise FormatError(f"{linear.name}: {e}; the artifact does not fit its own grid") from None
    return packed.reshape(linear.out_features, t.row_bytes(linear.in_features))


def _blocks(home: str, d: np.ndarray, z: np.ndarray, q: np.ndarray) -> Blocks:
    """d float16 [n], z int16 [n], q int16 [n, block]."""
    if home in ("Q4_0", "Q5_0", "Q3_K", "Q8_0"):
        middle = {"Q4_0": 8, "Q5_0": 16, "Q3_K": 4, "Q8_0": 0}[home]
        codes = _narrow(q - z[:, None] + middle, np.int8 if home == "Q8_0" else np.uint8)
        ones = np.full((len(d), 16), 33, np.uint8) if home == "Q3_K" else None  # a scale of 1, stored + 32
        return Blocks(d, codes, scales=ones)
    if home == "Q4_1":
        offset = (-d.astype(np.float32) * z).astype(np.float16)
        if not _portable(d[:, None], z[:, None]):
            raise ValueError("scale times zero-point is not exact in float16")
        return Blocks(d, _narrow(q, np.uint8), offset)
    if home in ("Q2_K", "Q4_K"):
        subs = 16 if home == "Q2_K" else 8
        mins = np.repeat(_narrow(z, np.uint8)[:, None], subs, axis=1)
        return Blocks(d, _narrow(q, np.uint8), d, np.ones((len(d), subs), np.uint8), mins)
    if home == "TQ2_0":
        if not np.isin(z, (1, 2)).all():
            raise ValueError("a zero-point is neither 1 nor 2")
        return Blocks(np.where(z == 2, -d, d), _narrow(np.where(z[:, None] == 2, 3 - q, q), np.uint8))
    raise ValueError("no grid of ours is stored in this type")


def _natural(linear: QuantizedLinear) -> None:
    groups = linear.scales.shape[1]
    g_idx = linear.g_idx.numpy()
    if linear.in_features % groups or not np.array_equal(
        g_idx, np.arange(linear.in_features) // (linear.in_features // groups)
    ):
        raise FormatError(
            f"{linear.name}: groups are not contiguous columns, and GGUF has no g_idx; quantize with --act-order gar, static or off"
        )


def _portable(scales: np.ndarray, zeros: np.ndarray) -> bool:
    """Whether every scale · zero_point is a float16."""
    product = scales.astype(np.float32) * zeros.astype(np.float32)
    with np.errstate(over="ignore"):
        return bool((product.astype(np.float16).astype(np.float32) == product).all())


def _narrow(x: np.ndarray, dtype: type) -> np.ndarray:
    """A cast that refuses to wrap."""
    info = np.iinfo(dtype)
    if x.size and (x.min() < info.min or x.max() > info.max):
        raise ValueError(f"values {x.min()}..{x.max()} do not fit {np.dtype(dtype).name}")
    return x.astype(dtype)
