"""Randomized Hadamard rotations of a decoder's activations, folded into its weights (QuaRot, arXiv 2404.00456; methods.md §4.3).

    h' = h·Q                        the residual stream: what writes into it is multiplied by Q, what reads it by Qᵀ
    v' = v·R for each head          values: rows of v_proj against columns of o_proj
    norm(h)·diag(γ)·W → norm(h)·W'  gains go into the linears that read the norm, since RMSNorm commutes with Q only without

The rotated model computes the same function; its weights and activations have no outlying channels. Vision features and
everything else that joins the residual stream are rotated where they are made (`Family.writers`), and a tied output matrix gets
weights of its own: it takes the last norm's gain, which the embedding must not.

`online` also rotates the input of down_proj, for which the running model needs a Hadamard product between two linears: no
stock runtime has it. It is there to evaluate quantized activations.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import nn

from vlmq_export.errors import CheckpointError
from vlmq_export.quantizer.checkpoint import DTYPES, Checkpoint, TensorInfo
from vlmq_export.quantizer.families import DECODER_GROUPS, DECODER_NORMS, Family, family_of, text_config, untied

ROTATIONS = ("off", "folded", "online")
_RESIDUAL, _INNER, _HEADS, _VALUES = range(4)  # which rotation it is; layer i's values have _VALUES + i


@dataclass(frozen=True)
class Rotation:
    """Q = diag(±1)·(H ⊗ R), orthogonal [n, n] with n = 2^k·m, m odd: H the Hadamard matrix of 2^k, R a random one of m.

    Never formed: a product costs n·(k + m) operations a row.
    """

    signs: torch.Tensor  # float64 [n]
    odd: torch.Tensor  # R, float64 [m, m]

    @classmethod
    def of(cls, size: int, seed: int, which: int) -> Rotation:
        """The same for the same arguments, on every machine."""
        generator = torch.Generator().manual_seed((seed * 2**20 + which) % 2**63)
        signs = torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1
        m = size // (size & -size)
        odd, upper = torch.linalg.qr(torch.randn(m, m, generator=generator, dtype=torch.float64))
        return cls(signs, odd * upper.diagonal().sign())  # the decomposition made unique

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """x·Q over the last axis, in the precision of x."""
        m = len(self.odd)
        y = (x * self.signs.to(x)).unflatten(-1, (-1, m)).transpose(-1, -2)  # [..., m, 2^k]
        return (hadamard(y).transpose(-1, -2) @ self.odd.to(x)).flatten(-2)

    def blocks(self, x: torch.Tensor) -> torch.Tensor:
        """The same on each of the blocks of n that the last axis falls into."""
        return self.apply(x.unflatten(-1, (-1, len(self.signs)))).flatten(-2)


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """x·H over the last axis, a power of two long; H is orthogonal, symmetric and ±n^−½ throughout."""
    size, step = x.shape[-1], 1
    while step < size:
        low, high = x.unflatten(-1, (-1, 2, step)).unbind(-2)
        x = torch.stack((low + high, low - high), -2).flatten(-3)
        step *= 2
    return x / size**0.5


class RotatedCheckpoint(Checkpoint):
    """A checkpoint as if its author had published the rotated model: other values under the same names.

    Weights of decoder linears are float32. Rotated tensors that stay floats are float16, or float32 where the source is: a
    rotation leaves no large values, and float16's grid is finer than bfloat16's there.
    Raises CheckpointError where the model cannot be rotated.
    """

    def __init__(self, path: Path, seed: int, *, online: bool = False):
        super().__init__(path)
        self.source = Checkpoint(path)
        self.family, self.seed, self.online = family_of(self.config), seed, online
        text = text_config(self.config)
        self.hidden, self.inner = int(text["hidden_size"]), int(text["intermediate_size"])
        self.head_dim = int(text.get("head_dim") or self.hidden // int(text["num_attention_heads"]))
        self._outside = self.family.layers.removesuffix("layers.")
        self._head = self.family.hub_name("lm_head.weight")
        self._residual = Rotation.of(self.hidden, seed, _RESIDUAL)
        self._refuse()
        self.config = untied(self.config)
        names = [*self.tensors, *({self._head} - self.tensors.keys())]
        self.tensors = {name: self._info(name) for name in names}

    def _refuse(self) -> None:
        """Raises CheckpointError for a decoder of another kind, or one whose vision features are not this wide."""
        why = ""
        if (self.family.groups, self.family.norms) != (DECODER_GROUPS, DECODER_NORMS) or not self.family.writers:
            why = f"decoders of {self.family.model_type} cannot be rotated"
        for name, info in self.tensors.items():
            if name.startswith(self.family.layers) and name.endswith("norm.bias"):
                why = f"{name} is a bias of a norm, which does not rotate"
            if not name.startswith(self.family.layers) and changes(name, self.family) and self.hidden not in info.shape:
                why = f"{name} of shape {list(info.shape)} does not write into a stream of {self.hidden}"
        if why:
            raise CheckpointError(f"--rotate: {why}; leave it off")

    def _origin(self, name: str) -> str:
        """The source's tensor: for a tied head, the embedding."""
        return name if name in self.source.tensors else f"{self._outside}embed_tokens.weight"

    def _info(self, name: str) -> TensorInfo:
        info = replace(self.source.info(self._origin(name)), name=name)
        if not changes(name, self.family) or name.endswith("norm.weight"):
            return info
        wide = name.startswith(self.family.layers) or info.dtype in ("F32", "F64")
        return replace(info, dtype="F32" if wide else "F16")

    def tensor(self, name: str, rows: Sequence[int] | None = None) -> torch.Tensor:
        if not changes(name, self.family):
            return self.source.tensor(name, rows)
        value = self.exact(name, rows).to(DTYPES[self.info(name).dtype]).contiguous()
        if not bool(torch.isfinite(value).all()):
            raise CheckpointError(f"{name} exceeds float16's range when rotated; leave --rotate off")
        return value

    def exact(self, name: str, rows: Sequence[int] | None = None) -> torch.Tensor:
        """A tensor before it is rounded, float64."""
        self.info(name)  # raises for a name that is not there
        value = self.source.tensor(self._origin(name), rows).double()
        if not changes(name, self.family):
            return value
        if name.startswith(self.family.layers):
            return self._of_layer(name, value)
        if name == self._head:
            return self._residual.apply(value * self.source.tensor(f"{self._outside}norm.weight").double())
        if name.endswith("norm.weight"):
            return torch.ones_like(value)
        if value.ndim == 2 and not name.endswith("embed_tokens.weight"):  # [hidden, in]: it writes its outputs
            return self._residual.apply(value.T).T
        return self._residual.apply(value)

    def _of_layer(self, name: str, value: torch.Tensor) -> torch.Tensor:
        index, _, part = name.removeprefix(self.family.layers).partition(".")
        module, _, leaf = part.rpartition(".")
        if module in dict(self.family.norms):
            return torch.ones_like(value)
        values = Rotation.of(self.head_dim, self.seed, _VALUES + int(index))
        if leaf == "weight":
            for norm, readers in self.family.norms:
                if module in readers:
                    gain = self.source.tensor(f"{self.family.layers}{index}.{norm}.weight").double()
                    value = self._residual.apply(value * gain)
        if module == "self_attn.v_proj":
            return values.blocks(value.T).T if leaf == "weight" else values.blocks(value)
        if module in ("self_attn.o_proj", "mlp.down_proj"):
            if leaf == "bias":
                return self._residual.apply(value)
            if module == "self_attn.o_proj":
                value = values.blocks(value)
            elif self.online:
                value = self.inner_rotation().apply(value)
            return self._residual.apply(value.T).T
        return value

    def inner_rotation(self) -> Rotation:
        """Of down_proj's input, where the rotation is online."""
        return Rotation.of(self.inner, self.seed, _INNER)

    def head_rotation(self) -> Rotation:
        """Of queries and keys after their positions are in, which leaves their products alone."""
        return Rotation.of(self.head_dim, self.seed, _HEADS)

    def write_config(self, target: Path) -> None:
        target.write_text(json.dumps(self.config, indent=2, ensure_ascii=False) + "\n", "utf-8")


def rotated(checkpoint: Checkpoint, rotate: str, seed: int) -> Checkpoint:
    """The checkpoint as the recipe's `rotate` asks for it."""
    if rotate == "off" or isinstance(checkpoint, RotatedCheckpoint):
        return checkpoint
    return RotatedCheckpoint(checkpoint.path, seed, online=rotate == "online")


def rotate_inner(layers: Sequence[nn.Module], rotation: Rotation) -> None:
    """Let decoder layers rotate the input of down_proj, whose weight expects it."""

    def forward(mlp: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return mlp.down_proj(rotation.apply(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)))

    for layer in layers:
        layer.mlp.forward = lambda x, mlp=layer.mlp: forward(mlp, x)


def changes(name: str, family: Family) -> bool:
    """Whether a rotation gives this tensor (hub name) other values."""
    if name.startswith(family.layers):
        module, _, leaf = name.removeprefix(family.layers).partition(".")[2].rpartition(".")
        biased = ("self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj")
        return module in biased or (leaf == "weight" and module in _WEIGHTS)
    outside = family.layers.removesuffix("layers.")
    own = (f"{outside}embed_tokens.weight", f"{outside}norm.weight", family.hub_name("lm_head.weight"))
    return name in own or any(fnmatchcase(name, w) or fnmatchcase(name, f"{w}.*") for w in family.writers)


_WEIGHTS = {*(n for group in DECODER_GROUPS for n in group), *(norm for norm, _ in DECODER_NORMS)}
