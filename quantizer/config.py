"""What the quantizer is asked to do, as one plain value."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace

BITS = (2, 3, 4, 8)
ACT_ORDERS = ("off", "static", "gar", "dynamic")


@dataclass(frozen=True)
class QuantConfig:
    """One quantization recipe for every linear of the language backbone.

    `group_size` is −1 for one scale per output channel. Weights decode as `scale * (code - zero_point)`.
    `act_order` names the order of the column loop (methods.md §2.3): `off` natural; `static` groups fixed before
    reordering; `gar` group-aware; `dynamic` the papers' own, with a permuted `g_idx`.

    `head_bits` is the width of the output head's codes, in the same groups; 0 leaves it as it is.
    """

    method: str = "vlmq"
    bits: int = 4
    group_size: int = 128
    symmetric: bool = False
    act_order: str = "gar"
    damp: float = 0.01  # share of mean(diag A) added to the diagonal
    alpha: float = 0.25  # GPTAQ's factor on the asymmetric term
    block_size: int = 128  # lazy-update block of the column loop
    seed: int = 0
    rotate: str = "off"  # off | folded | online (rotation.py)
    head_bits: int = 0
    gguf_type: str = ""  # the mix that `types` came from: Q4_K_M
    types: dict[str, str] = field(default_factory=dict)  # hub module → GGUF block type, in place of the affine grid

    @property
    def head(self) -> QuantConfig:
        """The output head's own: 8 bits are symmetric, as no runtime format holds them otherwise."""
        symmetric = self.head_bits == 8 or (self.symmetric and self.bits != 8)
        return replace(self, bits=self.head_bits, symmetric=symmetric)

    def of(self, name: str) -> QuantConfig:
        """The recipe of one linear, by its hub name."""
        return self.head if self.head_bits and name.rpartition(".")[2] == "lm_head" else self

    def groups(self, in_features: int) -> int:
        return 1 if self.group_size == -1 else in_features // self.group_size

    def group_columns(self, in_features: int) -> int:
        """Columns that share one scale."""
        return in_features if self.group_size == -1 else self.group_size

    def to_dict(self) -> dict:
        return asdict(self)
