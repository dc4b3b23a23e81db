"""Reads the weights of a GPTQ folder. Nothing here is shared with the writer."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from vlmq_export.errors import FormatError
from vlmq_export.formats.in_transformers.read import QuantizedFolder, unpack

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
        self.bits: int = bits
        self.zero_offset = 1 if version == "gptq" else 0  # v1 stores the zero-point minus one

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
        groups = scales.shape[0]
        if (
            qweight.shape != (k * self.bits // 32, n)
            or qzeros.shape != (groups, n * self.bits // 32)
            or scales.shape != (groups, n)
            or (g_idx < 0).any()
            or (g_idx >= groups).any()
            or {qweight.dtype, qzeros.dtype, g_idx.dtype} != {np.dtype(np.int32)}
        ):
            raise FormatError(
                f"{self.path}: the tensors of {module} do not fit together; export again"
            )
        codes = unpack(qweight, self.bits).T  # [N, K]
        stored = unpack(np.ascontiguousarray(qzeros.T), self.bits)
        zeros = stored.astype(np.int16) + self.zero_offset  # [N, G]
        self._refuse_mislabelled(module, zeros)
        steps = codes.astype(np.int16) - zeros[:, g_idx]
        return steps.astype(np.float32) * scales.T.astype(np.float32)[:, g_idx]

    def _refuse_mislabelled(self, module: str, zeros: np.ndarray) -> None:
        """Raises FormatError where v1 and v2 were confused.

        The zero-points of a symmetric grid are all 2^(bits−1). They are off by one throughout in a
        folder that config.json gives the wrong version.
        """
        off = zeros.astype(int) - 2 ** (self.bits - 1)
        if self.quantization.get("sym") and abs(off.flat[0]) == 1 and (off == off.flat[0]).all():
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
