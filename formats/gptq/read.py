"""Reads the weights of a GPTQ folder. Nothing here is shared with the writer."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from vlmq_export.errors import FormatError
from vlmq_export.formats.in_transformers.read import QuantizedFolder, named_linears, unpack

PARTS = ("qweight", "qzeros", "scales", "g_idx")


class GptqFolder(QuantizedFolder):
    """A written GPTQ folder."""

    title, format, method, parts = "GPTQ", "gptq", "gptq", PARTS

    def _read_grid(self) -> None:
        q = self.quantization
        version, bits = q.get("checkpoint_format", "gptq"), q.get("bits")
        unknown = version not in ("gptq", "gptq_v2")
        if unknown or type(bits) is not int or bits not in (2, 3, 4, 8):
            raise FormatError(
                f"{self.path}: checkpoint_format {version} with {bits} bits is not readable here"
            )
        self.bits: int = bits  # of the linears that no rule names
        self._rules = self._read_rules(q.get("dynamic", {}))
        self.zero_offset = 1 if version == "gptq" else 0  # v1 stores the zero-point minus one

    def _read_rules(self, rules: object) -> list[tuple[set[str], int, bool]]:
        """The rules of `dynamic`: the linears that each names, their bits, and `sym`.

        Raises FormatError for rules that this program does not write.
        """
        found = []
        for key, stated in rules.items() if isinstance(rules, dict) else [("", rules)]:
            names = named_linears(key.removeprefix("+:")) if key.startswith("+:") else None
            own = stated if isinstance(stated, dict) else {}
            bits, sym = own.get("bits"), own.get("sym", self.quantization.get("sym"))
            known = type(bits) is int and bits in (2, 3, 4, 8) and own.keys() <= {"bits", "sym"}
            if names is None or not known:
                raise FormatError(
                    f"{self.path}: the rule {str(key)[:80]!r} of dynamic is not readable here"
                )
            found.append((names, bits, bool(sym)))
        return found

    @property
    def mixed(self) -> bool:
        """Whether the linears have several widths."""
        return bool(self._rules)

    def grid_of(self, module: str) -> tuple[int, bool]:
        """Bits and symmetry of a linear by its name in the file."""
        own = self.in_layers(module)
        stated = self.bits, bool(self.quantization.get("sym"))
        return next(((bits, sym) for names, bits, sym in self._rules if own in names), stated)

    @property
    def version(self) -> str:
        """v1 or v2."""
        return "v1" if self.zero_offset else "v2"

    def decode(self, module: str) -> np.ndarray:
        """The weights of a quantized module, by its name in the file: float32 [N, K].

        weight[n, k] = scales[g, n] · (codes[n, k] − zeros[g, n]) with g = g_idx[k]. Only the
        product is rounded.
        """
        qweight, qzeros, scales, g_idx = (self.raw(f"{module}.{p}").numpy() for p in PARTS)
        k, n = g_idx.shape[0], qweight.shape[1]
        bits, symmetric = self.grid_of(module)
        groups = scales.shape[0]
        if (
            qweight.shape != (k * bits // 32, n)
            or qzeros.shape != (groups, n * bits // 32)
            or scales.shape != (groups, n)
            or (g_idx < 0).any()
            or (g_idx >= groups).any()
            or {qweight.dtype, qzeros.dtype, g_idx.dtype} != {np.dtype(np.int32)}
        ):
            raise FormatError(
                f"{self.path}: the tensors of {module} do not fit together; export again"
            )
        codes = unpack(qweight, bits).T  # [N, K]
        stored = unpack(np.ascontiguousarray(qzeros.T), bits)
        zeros = stored.astype(np.int16) + self.zero_offset  # [N, G]
        if symmetric:
            self._refuse_mislabelled(module, zeros, bits)
        steps = codes.astype(np.int16) - zeros[:, g_idx]
        return steps.astype(np.float32) * scales.T.astype(np.float32)[:, g_idx]

    def _refuse_mislabelled(self, module: str, zeros: np.ndarray, bits: int) -> None:
        """Raises FormatError where v1 and v2 were confused.

        The zero-points of a symmetric grid are all 2^(bits−1). They are off by one throughout in a
        folder that config.json gives the wrong version.
        """
        off = zeros.astype(int) - 2 ** (bits - 1)
        if abs(off.flat[0]) == 1 and (off == off.flat[0]).all():
            other = {"v1": "v2", "v2": "v1"}[self.version]
            raise FormatError(
                f"{self.path}: {module}.qzeros are those of {other}"
                f" but config.json says {self.version}; export again"
            )


def read(path: str | Path) -> dict[str, np.ndarray | None]:
    """Every weight, decoded, by hub name. The whole model has to fit in memory.

    A weight is None if its name in the file is of another style than those of the layers.
    """
    folder = GptqFolder(path)
    return {name: folder.array(name) for name in folder.weight_names()}
