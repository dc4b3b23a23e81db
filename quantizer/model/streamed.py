"""The source model as transformers runs it, in float32, with weights that are read part by part.

Only the part that is about to run has its weights in memory: what comes before the first decoder
layer, one decoder layer, or what comes after the last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from vlmq_export.errors import CheckpointError
from vlmq_export.quantizer.model.architecture import Architecture, pretrained_config
from vlmq_export.quantizer.model.checkpoint import Checkpoint
from vlmq_export.quantizer.model.experts import separate
from vlmq_export.quantizer.model.fit import misfit
from vlmq_export.quantizer.storage.tensors import TensorInfo
from vlmq_export.quantizer.storage.untrusted import third_party

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


class WeightFiles(Protocol):
    """What a streamed model asks of weights that are no `Checkpoint`, which has the meanings."""

    @property
    def path(self) -> Path: ...  # of the folder with config.json

    @property
    def architecture(self) -> Architecture: ...

    @property
    def written_config(self) -> dict: ...  # the content of config.json

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...  # by hub name

    def info(self, name: str) -> TensorInfo: ...

    def tensor(self, name: str, rows: Sequence[int] | None = None) -> torch.Tensor: ...


class StreamedModel:
    """transformers' own model in float32, without weights.

    The weights of one part are read from the shards when it is filled, and dropped again. Raises
    CheckpointError where the checkpoint's names or shapes do not fit the class.
    """

    def __init__(self, checkpoint: Checkpoint | WeightFiles, device: torch.device):
        self.checkpoint, self.device = checkpoint, device
        # A PreTrainedModel. Its type does not tell what its modules have for attributes.
        self.model: Any = _empty_model(checkpoint).eval().requires_grad_(False)
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(device)
        self._family = checkpoint.architecture.family
        _refuse_misfit(checkpoint, self.model)
        # Parameter of the model → hub name of its tensor.
        self._source = {self._family.module_name(name): name for name in checkpoint.tensors}

    def layer(self, index: int) -> nn.Module:
        """A decoder layer, which has no weights unless it is filled."""
        return self.model.get_submodule(self._family.module_name(f"{self._family.layers}{index}"))

    @contextmanager
    def filled_layer(self, index: int) -> Iterator[nn.Module]:
        """A decoder layer with its source weights, float32 on the device, inside the block."""
        prefix = self._family.module_name(f"{self._family.layers}{index}.")
        with self._filled([name for name in self._source if name.startswith(prefix)]):
            yield self.layer(index)

    @contextmanager
    def filled_prefix(self, ids: torch.Tensor) -> Iterator[Any]:
        """The model with the weights of all that runs before the first decoder layer.

        Of the embedding matrix only the rows of the token ids `ids` [n] are read.
        """
        embedding, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        matrices = {id(embedding.weight), *(() if head is None else (id(head.weight),))}
        layers = self._family.module_name(self._family.layers)
        parameters = list(self.model.named_parameters())
        names = [n for n, p in parameters if not n.startswith(layers) and id(p) not in matrices]
        ids = ids.unique()
        matrix = self._source[next(n for n, p in parameters if p is embedding.weight)]
        rows = self.checkpoint.tensor(matrix, rows=ids.tolist())
        rows = rows.to(self.device).float()
        scale = getattr(embedding, "embed_scale", None)  # Gemma's √hidden
        self.model.set_input_embeddings(_Rows(ids.to(self.device), rows, scale))
        try:
            with self._filled(names):
                yield self.model
        finally:
            self.model.set_input_embeddings(embedding)

    @contextmanager
    def filled_head(self) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
        """What runs after the last decoder layer: [..., hidden] → logits [..., vocabulary]."""
        matrix = self.head_rows(0, self.head_shape[0])
        with self.filled_norm() as norm:
            yield lambda hidden: norm(hidden) @ matrix.T

    @contextmanager
    def filled_norm(self) -> Iterator[nn.Module]:
        """The norm between the last decoder layer and the output head."""
        prefix = self._family.module_name(self._family.layers).removesuffix("layers.") + "norm."
        with self._filled([name for name in self._source if name.startswith(prefix)]):
            yield self.model.get_submodule(prefix.rstrip("."))

    @property
    def _head(self) -> str:
        """Hub name of the output matrix's tensor, which is the embedding where they are tied."""
        weight = self.model.get_output_embeddings().weight
        return self._source[next(n for n, p in self.model.named_parameters() if p is weight)]

    @property
    def head_shape(self) -> tuple[int, ...]:
        """Shape of the output matrix, (vocabulary, hidden)."""
        return self.checkpoint.info(self._head).shape

    def head_rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` of the output matrix, float32 [rows, hidden] on the device."""
        rows = range(start, min(stop, self.head_shape[0]))
        return self.checkpoint.tensor(self._head, rows=rows).to(self.device).float()

    @contextmanager
    def _filled(self, names: list[str]) -> Iterator[None]:
        """These parameters have their source weights inside the block."""
        try:
            for name in names:
                self._set(name, self.checkpoint.tensor(self._source[name]).to(self.device).float())
            yield
        finally:
            for name in names:
                self._set(name, torch.empty_like(self.model.get_parameter(name), device="meta"))

    def _set(self, name: str, value: torch.Tensor) -> None:
        """Replace a parameter by one that holds `value`."""
        module, _, leaf = name.rpartition(".")
        setattr(self.model.get_submodule(module), leaf, nn.Parameter(value, requires_grad=False))


class _Rows(nn.Module):
    """An embedding that holds only the rows of the token ids that it will be asked for."""

    ids: torch.Tensor  # int64 [n], sorted

    def __init__(
        self, ids: torch.Tensor, rows: torch.Tensor, scale: torch.Tensor | None
    ):  # [n], [n, hidden] and a number
        super().__init__()
        self.register_buffer("ids", ids)
        self.weight = nn.Parameter(rows, requires_grad=False)
        self.scale = scale

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        rows = self.weight[torch.searchsorted(self.ids, ids)]
        return rows if self.scale is None else rows * self.scale


def parameter_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Hub name → shape of every parameter that config.json asks for.

    Of tied parameters only the first is named. Raises CheckpointError where transformers cannot
    make the model.
    """
    family = checkpoint.architecture.family
    return {
        family.hub_name(name): tuple(p.shape)
        for name, p in _empty_model(checkpoint).named_parameters()
    }


def tower_linears(checkpoint: Checkpoint | WeightFiles) -> list[str]:
    """Hub names of the linears of the vision tower and the projector, in the order of the modules.

    Raises CheckpointError where transformers cannot make the model.
    """
    family, model = checkpoint.architecture.family, _empty_model(checkpoint)
    names = [n for n, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [hub for name in names if family.is_vision(hub := family.hub_name(name))]


def refuse_misfit(checkpoint: Checkpoint | WeightFiles) -> None:
    """Raises CheckpointError for tensors that are not those of the model in config.json.

    The message says which are missing, which are too many or of another shape, and what to do.
    """
    _refuse_misfit(checkpoint, _empty_model(checkpoint))


def _refuse_misfit(checkpoint: Checkpoint | WeightFiles, model: PreTrainedModel) -> None:
    """The same, against a model that is made already."""
    family, own = checkpoint.architecture.family, {n for n, _ in model.named_parameters()}
    every = dict(model.named_parameters(remove_duplicate=False))
    problem = misfit(
        {name: info.shape for name, info in checkpoint.tensors.items()},
        {family.hub_name(name): tuple(p.shape) for name, p in every.items()},
        head=f"{family.head}.weight",
        tied={family.hub_name(name) for name in every if name not in own},
    )
    if problem:
        raise CheckpointError(f"{checkpoint.path}: {problem}")


def _empty_model(checkpoint: Checkpoint | WeightFiles) -> PreTrainedModel:
    """The model in float32, its parameters without storage, and a module for each expert.

    Raises CheckpointError.
    """
    config = pretrained_config(checkpoint.written_config)
    with (
        _parameters_on_meta(),
        third_party(f"{checkpoint.path}: transformers cannot make this model"),
    ):
        cls = model_class(config)
        model = cls._from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    separate(model)
    return model


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules made in this block have parameters without storage.

    Their buffers are computed from the config, and are real.
    """
    register = nn.Module.register_parameter

    def on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        # A tied parameter is registered twice. It is on meta the second time and stays the same.
        if param is not None and param.device.type != "meta":
            param = nn.Parameter(param.to("meta"), requires_grad=False)
        register(self, name, param)

    nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def load_model(checkpoint: Checkpoint, device: torch.device) -> nn.Module:
    """The whole model in float32, as transformers loads it. Streamed models are tested against it.

    Raises CheckpointError where the checkpoint does not fit the model.
    """
    import transformers

    config = pretrained_config(checkpoint.written_config)
    with (
        _no_progress_bar(transformers),
        third_party(f"{checkpoint.path}: transformers cannot load this model"),
    ):
        # With output_loading_info it returns a pair, which its annotation does not say.
        loaded: Any = model_class(config).from_pretrained(
            checkpoint.path,
            config=config,
            dtype=torch.float32,
            attn_implementation="sdpa",
            output_loading_info=True,
        )
        model, info = loaded
    if wrong := [*info["missing_keys"], *info["unexpected_keys"]]:
        first = min(map(str, wrong))
        raise CheckpointError(
            f"{checkpoint.path}: {len(wrong)} tensors do not fit the model, first {first}"
        )
    return model.to(device).eval().requires_grad_(False)


def model_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """transformers' class of a family's whole model, with its output matrix.

    `model_type` decides. What stands in `architectures` is the class that somebody saved, which may
    be one without an output matrix. Raises CheckpointError where transformers has no such class.
    """
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    classes: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING  # its annotation says pairs of classes
    try:
        return classes[type(config)]
    except KeyError:
        raise CheckpointError(
            f"transformers has no model with images and text for model_type {config.model_type}"
        ) from None


@contextmanager
def _no_progress_bar(transformers: Any) -> Iterator[None]:
    """Hide transformers' progress bar, because the command shows one of its own."""
    bars = transformers.utils.logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()
