"""Randomized Hadamard rotations of a decoder's activations, folded into its weights.

    h' = h·Q   residual stream: W becomes Qᵀ·W where it writes into h, and W·Q where it reads h
    v' = v·R   values of each head: Rᵀ·W for an attention's carrier (rows of v_proj), W·R for the
               columns of its `out` (o_proj)
    γ' = 1     norms: W becomes W·diag(γ) where it reads the norm, because an RMSNorm commutes with
               Q only without a gain. γ is the weight, or 1 more where `Family.gain` says so

QuaRot, arXiv 2404.00456; docs/methods.md §4.3. The rotated model computes the same function, and
its weights and activations have no outlying channels. Values are not rotated where the mix treats
the channels of a head apart, by a gate or a norm of its own (`SubBlock.turns`). Vision features and
everything else that joins the residual stream are rotated where they are made (`Family.writers`). A
tied output matrix gets weights of its own: it takes the gain of the last norm, which the embedding
must not.

`online` also rotates the input of an MLP's `out`, down_proj. The running model then needs a
Hadamard product between two linears, which no stock runtime has. It is there to evaluate quantized
activations.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlmq_export.errors import CheckpointError
from vlmq_export.quantizer.model.architecture import untied_config
from vlmq_export.quantizer.model.checkpoint import Checkpoint
from vlmq_export.quantizer.model.families import Family, SubBlock
from vlmq_export.quantizer.storage.tensors import DTYPES, TensorInfo

ROTATIONS = ("off", "folded", "online")
# The number of a rotation, which goes into its seed. The values of layer i have _VALUES + i.
_RESIDUAL, _INNER, _HEADS, _VALUES = range(4)


@dataclass(frozen=True)
class Rotation:
    """Q = diag(±1)·(H ⊗ R₀), orthogonal [n, n], for n = 2^k·m with m odd.

    H is the Hadamard matrix of size 2^k, and R₀ a random orthogonal matrix of size m. Q itself is
    never formed: a product costs n·(k + m) operations a row.
    """

    signs: torch.Tensor  # the diagonal of ±1, float64 [n]
    odd: torch.Tensor  # R₀, float64 [m, m]

    @classmethod
    def of(cls, size: int, seed: int, which: int) -> Rotation:
        """A rotation of `size`. The same arguments give the same rotation on every machine."""
        generator = torch.Generator().manual_seed((seed * 2**20 + which) % 2**63)
        signs = torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1
        m = size // (size & -size)
        odd, upper = torch.linalg.qr(torch.randn(m, m, generator=generator, dtype=torch.float64))
        # A positive diagonal makes the QR decomposition unique.
        return cls(signs, odd * upper.diagonal().sign())

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """x·Q over the last axis, [..., n] → [..., n], in the precision of x."""
        m = len(self.odd)
        y = (x * self.signs.to(x)).unflatten(-1, (-1, m)).transpose(-1, -2)  # [..., m, 2^k]
        return (hadamard(y).transpose(-1, -2) @ self.odd.to(x)).flatten(-2)

    def blocks(self, x: torch.Tensor) -> torch.Tensor:
        """The same for each block of n along the last axis, [..., blocks·n]."""
        return self.apply(x.unflatten(-1, (-1, len(self.signs)))).flatten(-2)


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """x·H over the last axis, whose length n is a power of two.

    H is orthogonal and symmetric, and all its elements are ±n^−½.
    """
    size, step = x.shape[-1], 1
    while step < size:
        low, high = x.unflatten(-1, (-1, 2, step)).unbind(-2)
        x = torch.stack((low + high, low - high), -2).flatten(-3)
        step *= 2
    return x / size**0.5


class RotatedCheckpoint(Checkpoint):
    """A checkpoint as if the rotated model had been published: other values under the same names.

    Weights of decoder linears are float32. Rotated tensors that stay floats are float16, or float32
    where the source has float32 or float64. A rotation leaves no large values, and for those that
    it leaves float16 is finer than bfloat16. Raises CheckpointError where the model cannot be
    rotated.
    """

    def __init__(self, path: Path, seed: int, *, online: bool = False):
        super().__init__(path)
        self.source = Checkpoint(path)
        source = self.source.architecture
        self.family, self.seed, self.online = source.family, seed, online
        text = source.text
        self.hidden, self.inner = int(text["hidden_size"]), int(text["intermediate_size"])
        self.head_dim = source.head_dim
        self._outside = self.family.layers.removesuffix("layers.")
        self._head = self.family.hub_name("lm_head.weight")
        self._residual = Rotation.of(self.hidden, seed, _RESIDUAL)
        self._refuse()
        self.config = untied_config(self.source.config)
        names = [*self.tensors, *({self._head} - self.tensors.keys())]
        self.tensors = {name: self._info(name) for name in names}

    def _refuse(self) -> None:
        """Raises CheckpointError for a decoder that cannot be rotated.

        That is one with norms behind its linears or with biases of norms, or one whose vision
        features do not have the width of its residual stream.
        """
        why = ""
        if not self.family.writers or any(block.post for block in self.family.every_block):
            why = f"decoders of {self.family.model_type} cannot be rotated"
        for name, info in self.tensors.items():
            inside = name.startswith(self.family.layers)
            if inside and name.endswith("norm.bias"):
                why = f"{name} is a bias of a norm, which does not rotate"
            if not inside and changes(name, self.family) and self.hidden not in info.shape:
                shape = list(info.shape)
                why = f"{name} of shape {shape} does not write into a stream of {self.hidden}"
        if why:
            raise CheckpointError(f"--rotate: {why}; leave it off")

    def _origin(self, name: str) -> str:
        """The source's tensor that this one is made of: for a tied output matrix, the embedding."""
        return name if name in self.source.tensors else f"{self._outside}embed_tokens.weight"

    def _info(self, name: str) -> TensorInfo:
        """Shape and dtype of a tensor of the rotated model."""
        info = replace(self.source.info(self._origin(name)), name=name)
        if not changes(name, self.family) or name.endswith("norm.weight"):
            return info
        wide = _quantized(name, self.family) or info.dtype in ("F32", "F64")
        return replace(info, dtype="F32" if wide else "F16")

    def tensor(self, name: str, rows: Sequence[int] | None = None) -> torch.Tensor:
        """One tensor of the rotated model.

        Of the embedding and of the output matrix, `rows` gives some rows alone. Raises
        CheckpointError as Checkpoint.tensor does, and for values that float16 cannot hold.
        """
        if not changes(name, self.family):
            return self.source.tensor(name, rows)
        value = self.exact(name, rows).to(DTYPES[self.info(name).dtype]).contiguous()
        if not bool(torch.isfinite(value).all()):
            raise CheckpointError(
                f"{name} exceeds float16's range when rotated; leave --rotate off"
            )
        return value

    def exact(self, name: str, rows: Sequence[int] | None = None) -> torch.Tensor:
        """A tensor of the rotated model, float64, before it is rounded.

        Raises CheckpointError as Checkpoint.tensor does.
        """
        self.info(name)  # raises for a name that is not there
        value = self.source.tensor(self._origin(name), rows).double()
        if not changes(name, self.family):
            return value
        if name.startswith(self.family.layers):
            return self._of_layer(name, value)
        if name == self._head:
            return self._residual.apply(value * self._gain(f"{self._outside}norm"))
        if name.endswith("norm.weight"):
            return torch.full_like(value, 1 - self.family.gain)
        # A writer's weight is [hidden, in]. The embedding is [vocabulary, hidden], and everything
        # else is a vector [hidden].
        if value.ndim == 2 and not name.endswith("embed_tokens.weight"):
            return self._residual.apply(value.T).T
        return self._residual.apply(value)

    def _of_layer(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """A tensor of a decoder layer, rotated. `value` is the source's, float64."""
        index, _, part = name.removeprefix(self.family.layers).partition(".")
        module, _, leaf = part.rpartition(".")
        chain = self.source.architecture.blocks(int(index))
        block = next(b for b in chain if module in (b.norm, *b.readers, b.out))
        values = Rotation.of(self.head_dim, self.seed, _VALUES + int(index))
        if module == block.norm:
            return torch.full_like(value, 1 - self.family.gain)
        if module in block.readers and leaf == "weight":
            gain = self._gain(f"{self.family.layers}{index}.{block.norm}")
            value = self._residual.apply(value * gain)
        if module in block.readers:
            if not block.turns or module != block.carrier:
                return value
            return values.blocks(value.T).T if leaf == "weight" else values.blocks(value)
        if leaf == "bias":
            return self._residual.apply(value)
        if block.turns:
            value = values.blocks(value)
        elif self.online and block.kind == "mlp":
            value = self.inner_rotation().apply(value)
        return self._residual.apply(value.T).T

    def _gain(self, norm: str) -> torch.Tensor:
        """What a norm of the source multiplies by, float64 [hidden]."""
        return self.source.tensor(f"{norm}.weight").double() + self.family.gain

    def inner_rotation(self) -> Rotation:
        """The rotation of the input of an MLP's `out`, where rotations are online."""
        return Rotation.of(self.inner, self.seed, _INNER)

    def head_rotation(self) -> Rotation:
        """The rotation of queries and keys after their positions are in.

        Their products stay the same.
        """
        return Rotation.of(self.head_dim, self.seed, _HEADS)

    def write_config(self, target: Path) -> None:
        """Write the config.json of the rotated model, whose output matrix is never tied."""
        target.write_text(json.dumps(self.config, indent=2, ensure_ascii=False) + "\n", "utf-8")


def rotated(checkpoint: Checkpoint, rotate: str, seed: int) -> Checkpoint:
    """The checkpoint as the recipe's `rotate`, one of ROTATIONS, asks for it.

    One that is rotated already is returned as it is. Raises CheckpointError where the model cannot
    be rotated.
    """
    if rotate == "off" or isinstance(checkpoint, RotatedCheckpoint):
        return checkpoint
    return RotatedCheckpoint(checkpoint.path, seed, online=rotate == "online")


def rotate_inner(
    layers: Sequence[nn.Module], blocks: Sequence[SubBlock], rotation: Rotation
) -> None:
    """Let decoder layers rotate the input of an MLP's `out`, whose weight expects it."""

    def forward(plain: Callable, out: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # Whoever calls `out` alone gives it what is rotated already.
        hook = out.register_forward_pre_hook(lambda _, x: (rotation.apply(x[0]),), prepend=True)
        try:
            return plain(*args, **kwargs)
        finally:
            hook.remove()

    for layer in layers:
        for block in (b for b in blocks if b.kind == "mlp"):
            module: Any = layer.get_submodule(block.module)
            module.forward = partial(forward, module.forward, layer.get_submodule(block.out))


def changes(name: str, family: Family) -> bool:
    """Whether a rotation gives this tensor, by its hub name, other values."""
    if name.startswith(family.layers):
        module, _, leaf = name.removeprefix(family.layers).partition(".")[2].rpartition(".")
        for block in family.every_block:
            if leaf == "weight" and module in (block.norm, *block.readers, block.out):
                return True
            # Of `ins`, values alone have a rotation of their outputs.
            if module == block.out or (block.turns and module == block.carrier):
                return True
        return False
    outside = family.layers.removesuffix("layers.")
    head = family.hub_name("lm_head.weight")
    if name in (f"{outside}embed_tokens.weight", f"{outside}norm.weight", head):
        return True
    return any(fnmatchcase(name, w) or fnmatchcase(name, f"{w}.*") for w in family.writers)


def _quantized(name: str, family: Family) -> bool:
    """Whether a tensor that is rotated belongs to a linear of the decoder that is quantized."""
    kept = {module for block in family.every_block for module in block.kept}
    module = name.removeprefix(family.layers).partition(".")[2].rpartition(".")[0]
    return name.startswith(family.layers) and module not in kept
