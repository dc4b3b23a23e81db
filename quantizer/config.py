"""What the quantizer is asked to do, as one plain value."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace

BITS = (2, 3, 4, 8)
# Width of the embedding's codes → the GGUF block type that has the same numbers.
EMBEDDING_TYPES = {4: "Q4_0", 8: "Q8_0"}
EMBEDDING_GROUP = 32  # columns of the embedding that share a scale: a block of these types
GROUP_SIZES = (128, 64, 32)  # the usual ones, which every runtime has kernels for
ACT_ORDERS = {
    "off": "columns in their natural order",
    "static": "the largest diag(A) first, groups fixed before the columns are reordered",
    "gar": "group-aware: whole groups are reordered, and columns inside each group",
    "dynamic": "the papers' own: the largest diag(A) first, with a permuted g_idx",
}
ROTATIONS = {
    "off": "no rotation",
    "folded": "Hadamard rotations folded into the weights",
    "online": "further rotations between linears, which no format can hold; for evaluation",
}
TOWER = "vision"  # the vision tower and the projector, where one width is chosen for both
VISION_GROUP = 32  # columns per scale of the vision tower: Q8_0, Q4_0 and MatMulNBits have these
# Width of the vision tower's codes → the GGUF block type of that width, and the width that linears
# have whose rows its blocks do not divide. 2 and 3 bits of such rows take no less room than 4. At 4
# bits Q4_K takes as much as the affine grid in Q4_0, and costs no less (docs/quality.md).
VISION_TYPES = {2: ("Q2_K", 4), 3: ("Q3_K", 4), 5: ("Q5_K", 8), 6: ("Q6_K", 8)}
# What is done with a sample that is too long because of its images.
LONG_IMAGES = {
    "scale": "images are scaled down to what the text leaves them",
    "drop": "the sample is dropped where an image would be cut, as in the paper",
}


@dataclass(frozen=True)
class QuantConfig:
    """One quantization recipe for every linear of the language backbone.

    A weight decodes as `scale · (code − zero_point)`.
    """

    method: str = "vlmq"  # a key of methods.METHODS
    bits: int = 4
    group_size: int = 128  # columns per scale; −1: one scale per output channel
    symmetric: bool = False
    act_order: str = "gar"  # order of the column loop, a key of ACT_ORDERS (docs/methods.md §2.3)
    damp: float = 0.01  # share of mean(diag A) that is added to the diagonal
    alpha: float = 0.25  # GPTAQ's factor on the asymmetric term
    block_size: int = 128  # columns of a lazy block of the column loop
    seed: int = 0
    rotate: str = "off"  # a key of ROTATIONS
    # Share of the spread between a linear's input channels that goes into its weights; 0: none.
    smooth: bool = False
    tune: int = 0  # steps of gradient descent on each solved decoder layer; 0: none
    head_bits: int = 0  # of the output head's codes, in the same groups; 0: the head stays float
    embedding_bits: int = 0  # of the token embedding's codes; 0: the embedding stays float
    vision_bits: int = 0  # of the vision tower's and the projector's linears; 0: they stay float
    # The GGUF block type of those of them whose rows its blocks divide; empty: all are affine.
    vision_type: str = ""
    # Whether they are quantized too where groups do not fill their rows. Only ONNX and GGUF hold
    # these.
    vision_short: bool = False
    gguf_type: str = ""  # the mix that `types` came from: Q4_K_M
    types: dict[str, str] = field(default_factory=dict)  # hub module → GGUF block type
    # Hub module → bits, for every linear of the decoder; empty: they all have `bits`.
    widths: dict[str, int] = field(default_factory=dict)

    @property
    def head(self) -> QuantConfig:
        """The recipe of the output head."""
        return self.at(self.head_bits)

    def at(self, bits: int) -> QuantConfig:
        """The recipe of a linear of another width, in the same groups.

        8 bits are symmetric there, because no runtime format holds them otherwise.
        """
        symmetric = bits == 8 or (self.symmetric and self.bits != 8)
        return replace(self, bits=bits, symmetric=symmetric, widths={})

    @property
    def embedding(self) -> QuantConfig:
        """The recipe of the embedding: a symmetric grid, which GGUF and ONNX hold alike."""
        bits, group = self.embedding_bits, EMBEDDING_GROUP
        return replace(self, bits=bits, group_size=group, symmetric=True, act_order="off")

    def with_vision(self, bits: int) -> QuantConfig:
        """The recipe with a vision tower of so many bits, on block types if the decoder is."""
        kind = VISION_TYPES.get(bits, ("",))[0] if self.types else ""
        return replace(self, vision_bits=bits, vision_type=kind)

    @property
    def vision(self) -> QuantConfig:
        """The recipe of the vision tower and the projector, where no block type is theirs.

        Symmetric groups of 32 are the one grid that GGUF holds at every width. ONNX and
        compressed-tensors hold it too.
        """
        order = "off" if self.act_order == "off" else "gar"
        bits = VISION_TYPES[self.vision_bits][1] if self.vision_type else self.vision_bits
        return replace(
            self,
            bits=bits,
            group_size=VISION_GROUP,
            symmetric=True,
            act_order=order,
            types={},
            widths={},
        )

    def of(self, name: str) -> QuantConfig:
        """The recipe of one matrix, by its hub name."""
        module = name.rpartition(".")[2]
        if self.head_bits and module == "lm_head":
            return self.head
        if self.embedding_bits and module == "embed_tokens":
            return self.embedding
        return self.at(self.widths[name]) if name in self.widths else self

    def groups(self, in_features: int) -> int:
        """The number of groups in a row of `in_features` columns."""
        return 1 if self.group_size == -1 else in_features // self.group_size

    def group_columns(self, in_features: int) -> int:
        """The number of columns that share one scale."""
        return in_features if self.group_size == -1 else self.group_size

    def to_dict(self) -> dict:
        """The recipe as manifest.json stores it.

        What stays float, embedding or tower, has no key, as in earlier versions. Nor have widths
        where all linears have one.
        """
        later = ("smooth", "embedding_bits", "vision_bits", "vision_type", "vision_short", "widths")
        return {key: value for key, value in asdict(self).items() if key not in later or value}
