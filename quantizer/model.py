"""The source model as transformers runs it: device, arithmetic, and weights that come and go part by part."""

from __future__ import annotations

import os
from contextlib import contextmanager

import torch
from torch import nn

from vlmq_export.errors import CheckpointError, UsageError
from vlmq_export.quantizer.checkpoint import Checkpoint
from vlmq_export.quantizer.families import family_of, is_tied
from vlmq_export.quantizer.untrusted import third_party


def pick_device(device: str) -> torch.device:
    """`auto` is CUDA where there is one, its own under torchrun. Raises UsageError where it was asked for and is not there."""
    if device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"device {device} is not known; choose auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: PyTorch sees no CUDA device here; use --device cpu")
    if device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


TENSOR_CORES = True  # tools/gpu_check.py compares devices with and without


@contextmanager
def exact_arithmetic():
    """float32 products as float32: TensorFloat-32 off, which vision towers' convolutions use by default on CUDA."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def tensor_cores():
    """float32 products in TensorFloat-32 (11 significant bits) on CUDA; nothing changes on a machine without it.

    For statistics and the forward passes of the walk, whose inputs are rounded far more coarsely by every runtime; what it
    costs is in docs/performance.md. Never for the column loop or the factorization.
    """
    if not (TENSOR_CORES and torch.cuda.is_available()):
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class StreamedModel:
    """transformers' own model in float32, without weights: those of one part are read from the shards and dropped again.

    Raises CheckpointError where the checkpoint's names or shapes do not fit the class.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device):
        self.checkpoint, self.device = checkpoint, device
        self.model = _empty_model(checkpoint).eval().requires_grad_(False)
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(device)
        self._family = family_of(checkpoint.config)
        self._source = self._match()

    def _match(self) -> dict[str, str]:
        """Parameter of the model → tensor of the checkpoint."""
        source = {self._family.module_name(name): name for name in self.checkpoint.tensors}
        wanted = dict(self.model.named_parameters(remove_duplicate=False))
        absent = [name for name, _ in self.model.named_parameters() if name not in source]  # tied ones once
        wrong = sorted([*absent, *(hub for name, hub in source.items() if name not in wanted)])
        if wrong:
            raise CheckpointError(
                f"{self.checkpoint.path}: {len(wrong)} tensors do not fit the model, first {wrong[0]}"
            )
        for name, hub in source.items():
            if (shape := self.checkpoint.info(hub).shape) != tuple(wanted[name].shape):
                raise CheckpointError(
                    f"{self.checkpoint.path}: {hub} has shape {shape} where config.json asks for {tuple(wanted[name].shape)}"
                )
        return source

    def layer(self, index: int) -> nn.Module:
        """A decoder layer, empty unless filled."""
        return self.model.get_submodule(self._family.module_name(f"{self._family.layers}{index}"))

    @contextmanager
    def filled_layer(self, index: int):
        """A decoder layer with its source weights in float32 on the device; on leaving they are dropped."""
        prefix = self._family.module_name(f"{self._family.layers}{index}.")
        with self._filled([name for name in self._source if name.startswith(prefix)]):
            yield self.layer(index)

    @contextmanager
    def filled_prefix(self, ids: torch.Tensor):
        """All that runs before the first decoder layer; of the embedding matrix only the rows of `ids` [n]."""
        embedding, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        outside = {id(embedding.weight), *(() if head is None else (id(head.weight),))}
        layers = self._family.module_name(self._family.layers)
        parameters = list(self.model.named_parameters())
        names = [n for n, p in parameters if not n.startswith(layers) and id(p) not in outside]
        ids = ids.unique()
        matrix = self._source[next(n for n, p in parameters if p is embedding.weight)]
        rows = self.checkpoint.tensor(matrix, rows=ids.tolist())
        self.model.set_input_embeddings(_Rows(ids.to(self.device), rows.to(self.device).float()))
        try:
            with self._filled(names):
                yield self.model
        finally:
            self.model.set_input_embeddings(embedding)

    @contextmanager
    def filled_head(self):
        """What runs after the last decoder layer: a function of its output, [..., hidden] → logits."""
        matrix = self.head_rows(0, self.head_shape[0])
        with self.filled_norm() as norm:
            yield lambda hidden: norm(hidden) @ matrix.T

    @contextmanager
    def filled_norm(self):
        """The norm between the last decoder layer and the output head."""
        prefix = self._family.module_name(self._family.layers).removesuffix("layers.") + "norm."
        with self._filled([name for name in self._source if name.startswith(prefix)]):
            yield self.model.get_submodule(prefix.rstrip("."))

    @property
    def _head(self) -> str:
        """The checkpoint's tensor that is the output matrix: the embedding where it is tied.

        A rotated checkpoint has one of its own, although the model that config.json makes is tied.
        """
        if not is_tied(self.checkpoint.config) and self._source.get("lm_head.weight"):
            return self._source["lm_head.weight"]
        weight = self.model.get_output_embeddings().weight
        return self._source[next(n for n, p in self.model.named_parameters() if p is weight)]

    @property
    def head_shape(self) -> tuple[int, ...]:
        return self.checkpoint.info(self._head).shape

    def head_rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows of the output matrix, float32 [rows, hidden] on the device."""
        rows = range(start, min(stop, self.head_shape[0]))
        return self.checkpoint.tensor(self._head, rows=rows).to(self.device).float()

    @contextmanager
    def _filled(self, names: list[str]):
        try:
            for name in names:
                self._set(name, self.checkpoint.tensor(self._source[name]).to(self.device).float())
            yield
        finally:
            for name in names:
                self._set(name, torch.empty_like(self.model.get_parameter(name), device="meta"))

    def _set(self, name: str, value: torch.Tensor) -> None:
        module, _, leaf = name.rpartition(".")
        setattr(self.model.get_submodule(module), leaf, nn.Parameter(value, requires_grad=False))


class _Rows(nn.Module):
    """An embedding that holds the rows of the ids it will be asked for: ids sorted [n], rows [n, hidden]."""

    def __init__(self, ids: torch.Tensor, rows: torch.Tensor):
        super().__init__()
        self.register_buffer("ids", ids)
        self.weight = nn.Parameter(rows, requires_grad=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.weight[torch.searchsorted(self.ids, ids)]


def parameter_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Hub name → shape of every parameter that config.json asks for; tied ones once."""
    family = family_of(checkpoint.config)
    return {family.hub_name(name): tuple(p.shape) for name, p in _empty_model(checkpoint).named_parameters()}


def _empty_model(checkpoint: Checkpoint) -> nn.Module:
    """The model in float32, its parameters without storage."""
    cls, config = _class_of(checkpoint)
    with _parameters_on_meta(), third_party(f"{checkpoint.path}: transformers cannot make this model"):
        return cls._from_config(config, dtype=torch.float32, attn_implementation="sdpa")


def _class_of(checkpoint: Checkpoint):
    """transformers' class and config of a checkpoint."""
    import transformers

    with third_party(f"{checkpoint.path}: transformers cannot load this model"):
        config = transformers.AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=False)
    return model_class(transformers, config.architectures), config


@contextmanager
def _parameters_on_meta():
    """Modules made here have parameters without storage; buffers, which come from the config, are real."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.device.type != "meta":  # a tied parameter comes twice, and stays one
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def load_model(checkpoint: Checkpoint, device: torch.device) -> nn.Module:
    """The whole model in float32, as transformers loads it: what a streamed one is compared with."""
    import transformers

    cls, _ = _class_of(checkpoint)
    with _no_progress_bar(transformers), third_party(f"{checkpoint.path}: transformers cannot load this model"):
        model, info = cls.from_pretrained(
            checkpoint.path, dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True
        )
    if wrong := [*info["missing_keys"], *info["unexpected_keys"]]:
        raise CheckpointError(
            f"{checkpoint.path}: {len(wrong)} tensors do not fit the model, first {sorted(map(str, wrong))[0]}"
        )
    return model.to(device).eval().requires_grad_(False)


def model_class(transformers, architectures: object) -> type[nn.Module]:
    """The class that config.json names. Raises CheckpointError unless it is one of transformers' own models."""
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    cls = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise CheckpointError(f"config.json names no model class of transformers {transformers.__version__} ({name})")
    return cls


@contextmanager
def _no_progress_bar(transformers):
    """The run shows its own."""
    bars = transformers.utils.logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()
