"""A source checkpoint on disk, read one tensor at a time.

Only safetensors files are read, and their headers are checked before any weight is used. A shard
whose path leaves the folder is refused, where transformers would follow `../` in an index.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch

from vlmq_export.errors import CheckpointError
from vlmq_export.quantizer.model.architecture import Architecture, untied_config
from vlmq_export.quantizer.model.experts import parts_of
from vlmq_export.quantizer.model.families import COMPUTED, FAMILIES, Family
from vlmq_export.quantizer.storage.tensors import (
    TensorInfo,
    count_non_finite,
    read_infos,
    read_tensor,
    weight_map,
)
from vlmq_export.quantizer.storage.untrusted import contained, read_json
from vlmq_export.quantizer.storage.whole_files import sha256_file, write_json

log = logging.getLogger("vlmq_export")
_PROBLEMS_SHOWN = 8
# Keys of config.json under which quantizers leave their settings, and the parts that may have them.
_QUANTIZED = ("quantization_config", "compression_config", "quantization")
_PARTS = ("text_config", "vision_config")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_ROWS = 4096  # of a matrix that are compared at a time
# The files beside the weights that a runtime needs. They are copied into every export as they are.
COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
    "chat_template.jinja",
    "LICENSE",
    "LICENSE.txt",
)


class Checkpoint:
    """A local model folder in the hub's layout.

    It holds config.json, one safetensors file or several shards with their index, and the files of
    tokenizer and processor. Raises CheckpointError for a folder that is incomplete, damaged or
    quantized already.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_dir():
            raise CheckpointError(f"{path}: no such model folder")
        self._refuse_adapter()
        if not (self.path / "config.json").is_file():
            raise CheckpointError(f"{path}: no config.json in this folder; {_instead(self.path)}")
        # As its author wrote it.
        self.config: dict = _without_empty(read_json(self._contained("config.json")))
        self._refuse_quantized()
        self.tensors: dict[str, TensorInfo] = self._hub_names(self._index())  # by hub name

    def _refuse_adapter(self) -> None:
        """Raises CheckpointError for a LoRA, which is no model of its own.

        transformers would load the model that it names instead.
        """
        file = self.path / "adapter_config.json"
        if file.is_file():
            base = read_json(self._contained(file.name)).get("base_model_name_or_path")
            raise CheckpointError(
                f"{self.path}: holds an adapter ({file.name}) of {base or 'another model'};"
                " merge it first (in peft: merge_and_unload, then save_pretrained) and give the"
                " merged folder"
            )

    def _refuse_quantized(self) -> None:
        """Raises CheckpointError for a model that is quantized already."""
        nested = [v for k in _PARTS if isinstance(v := self.config.get(k), dict)]
        found = [part[key] for part in (self.config, *nested) for key in _QUANTIZED if key in part]
        for settings in found:
            known = settings if isinstance(settings, dict) else {}
            method = known.get("quant_method", "unknown")
            raise CheckpointError(
                f"{self.path}: already quantized ({method}); give the original float checkpoint"
            )

    def _contained(self, name: str) -> Path:
        """A file of the folder. Raises CheckpointError for a name that leads out of it."""
        try:
            return contained(self.path, name)
        except ValueError as e:
            raise CheckpointError(f"{self.path}: {e}") from None

    @property
    def model_type(self) -> str:
        """The name of the family in config.json."""
        return str(self.config.get("model_type", "unknown"))

    @cached_property
    def architecture(self) -> Architecture:
        """What config.json says. Raises CheckpointError for a model that is not supported.

        Where it ties the output matrix to the embedding, and the files have two matrices that
        differ, the files are believed, as transformers believes them.
        """
        found = Architecture.of(self.config)
        return found.untied() if found.tied and self._two_matrices(found.family) else found

    def _two_matrices(self, family: Family) -> bool:
        """Whether the files have an output matrix of other values than the embedding.

        Weights are read where both matrices are there, and no more of them than are the same.
        """
        pair = f"{family.head}.weight", f"{family.embedding}.weight"
        if not self.tensors.keys() >= {*pair}:
            return False
        head, embedding = (self.tensors[name] for name in pair)
        if (head.dtype, head.shape) != (embedding.dtype, embedding.shape):
            return True
        starts = range(0, head.shape[0], _ROWS)
        return not all(
            torch.equal(*(self.tensor(n, range(i, min(i + _ROWS, head.shape[0]))) for n in pair))
            for i in starts
        )

    @property
    def written_config(self) -> dict:
        """The config.json of what is made of this model.

        It is the author's, but for what the files contradict.
        """
        contradicted = Architecture.of(self.config).tied and not self.architecture.tied
        return untied_config(self.config) if contradicted else self.config

    def _index(self) -> dict[str, TensorInfo]:
        """name → TensorInfo over all shards, by the names in the files.

        Raises CheckpointError that reports every problem of the shards at once.
        """
        files, listed = self._weight_files()
        tensors, problems = self._read_headers(files)
        if listed is not None and not problems:
            problems = _disagreements(tensors, listed)
        if problems:
            hidden = len(problems) - _PROBLEMS_SHOWN
            more = f" (and {hidden} more)" if hidden > 0 else ""
            raise CheckpointError(f"{self.path}: " + "; ".join(problems[:_PROBLEMS_SHOWN]) + more)
        if extra := sorted(p.name for p in self.path.glob("*.safetensors") if p.name not in files):
            shown = ", ".join(extra[:_PROBLEMS_SHOWN])
            log.warning("%s: not in the index and not read: %s", self.path.name, shown)
        return tensors

    def _weight_files(self) -> tuple[list[str], dict[str, str] | None]:
        """The names of the weight files, and tensor → file where an index says so.

        Raises CheckpointError for a folder without safetensors files, and for one in which it is
        not clear which of them are meant.
        """
        index_path = self.path / "model.safetensors.index.json"
        single = self.path / "model.safetensors"
        if index_path.is_file():
            listed = weight_map(index_path)
            files = sorted(set(listed.values()))
            if single.is_file() and single.name not in files:  # transformers would read that one
                raise CheckpointError(
                    f"{self.path}: {single.name} and {index_path.name} are both here; delete one"
                )
            return files, listed
        if single.is_file():
            return [single.name], None
        if any(p.suffix in _PICKLED for p in self.path.iterdir()):
            raise CheckpointError(
                f"{self.path}: only pickled weights here, which we never unpickle; if you trust"
                " them, load the model in transformers and save_pretrained it as safetensors"
            )
        lost = f"{self.path}: no {single.name} and no {index_path.name}"
        if shard := min((p.name for p in self.path.glob("*.safetensors")), default=""):
            raise CheckpointError(f"{lost}, but {shard}; copy the index from the original model")
        raise CheckpointError(f"{lost}; {_instead(self.path)}")

    def _read_headers(self, files: Sequence[str]) -> tuple[dict[str, TensorInfo], list[str]]:
        """name → TensorInfo over these files, and what is wrong with them, one line a problem."""
        tensors: dict[str, TensorInfo] = {}
        problems: list[str] = []
        for file in files:
            try:
                shard = contained(self.path, file)
                infos = read_infos(shard) if shard.is_file() else None
            except (CheckpointError, ValueError) as e:
                problems.append(str(e))
                continue
            if infos is None:
                problems.append(f"shard {file} is missing")
                continue
            for name, info in infos.items():
                if name in tensors:
                    problems.append(f"tensor {name} is in both {tensors[name].file} and {file}")
                tensors[name] = replace(info, file=file)
        return tensors, problems

    def _hub_names(self, tensors: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
        """The same tensors by their published names, whichever version of transformers saved them.

        Fused experts become a tensor for each linear. What the model computes itself is left out,
        and what `Family.left_out` names. Names of a family that is not supported are left alone.
        Raises CheckpointError for a tensor that is there under two names.
        """
        family = FAMILIES.get(self.model_type)
        if family is None:
            return tensors
        tensors = parts_of(tensors) if family.sparse else tensors
        out = {name for name in tensors if family.left_out and name.startswith(family.left_out)}
        if out:
            log.info("%s: %d tensors left out, first %s", self.path.name, len(out), min(out))
        own = (n for n in tensors if n not in out and not n.endswith(COMPUTED))
        hub_names = {n: family.hub_name(n) for n in own}
        named = {hub: replace(tensors[name], name=hub) for name, hub in hub_names.items()}
        if len(named) < len(hub_names):
            seen: set[str] = set()
            twice = next(n for n, hub in hub_names.items() if hub in seen or seen.add(hub))
            raise CheckpointError(
                f"{self.path}: tensor {twice} is there under two names; keep one of them"
            )
        return named

    def info(self, name: str) -> TensorInfo:
        """What a header says of a tensor, by hub name. Raises CheckpointError if it is missing."""
        if name not in self.tensors:
            raise CheckpointError(
                f"{self.path}: tensor {name} is missing;"
                " the model type or the folder is not what it says"
            )
        return self.tensors[name]

    def tensor(self, name: str, rows: Sequence[int] | None = None) -> torch.Tensor:
        """One tensor by its hub name, or some of its rows, in its source dtype.

        Raises CheckpointError if it is missing, cannot be read, or holds values that are not
        finite.
        """
        info = self.info(name)
        try:
            value = read_tensor(self.path, info, rows)
        except (OSError, EOFError) as e:
            raise CheckpointError(
                f"{info.file}: cannot read {name} ({e}); copy the file again"
            ) from None
        if bad := count_non_finite(value):
            raise CheckpointError(
                f"{info.file}: {name} has {bad} NaN or infinite values; this checkpoint is damaged"
            )
        return value

    def write_config(self, target: Path) -> None:
        """Write the config.json of the model whose weights `tensor` gives.

        It has the author's bytes, unless something in it is not true of these weights.
        """
        if self.written_config == read_json(self._contained("config.json")):
            shutil.copyfile(self.path / "config.json", target)
        else:
            write_json(target, self.written_config)

    @cached_property
    def companions(self) -> list[Path]:
        """The files of COMPANIONS that are here.

        Raises CheckpointError for one that is a link out of the folder.
        """
        return [self._contained(n) for n in COMPANIONS if (self.path / n).is_file()]

    @cached_property
    def _fingerprint(self) -> dict[str, str]:
        files = ["config.json", *sorted({t.file for t in self.tensors.values()})]
        return {name: sha256_file(self.path / name) for name in files}

    def fingerprint(self) -> dict[str, str]:
        """file → SHA-256, for config.json and every weight file.

        A run may only be resumed with a checkpoint of the same fingerprint.
        """
        return self._fingerprint


def _instead(folder: Path) -> str:
    """What to give in place of a folder that holds no model."""
    if any(folder.glob("*.gguf")):
        return "from GGUF there is no way back, give the float model that it was made of"
    # A folder of the hub's cache has its files in snapshots/REVISION.
    below = [*folder.glob("*/config.json"), *folder.glob("snapshots/*/config.json")]
    if below:
        return f"give {max(below, key=lambda p: p.stat().st_mtime).parent}"
    return "give a folder in the Hugging Face layout, with config.json and safetensors"


def _without_empty(config: dict) -> dict:
    """The content of a config.json without settings of a quantizer that are null or empty.

    Some tools leave them in float models. transformers and vLLM take the mere key for a model that
    is quantized.
    """
    kept = {k: v for k, v in config.items() if k not in _QUANTIZED or v not in (None, {})}
    return kept | {
        key: _without_empty(part) for key in _PARTS if isinstance(part := kept.get(key), dict)
    }


def _disagreements(tensors: Mapping[str, TensorInfo], listed: Mapping[str, str]) -> list[str]:
    """Where the shards and their index (tensor → file) disagree, one line a problem."""
    problems = []
    absent = sorted(n for n, f in listed.items() if n not in tensors or tensors[n].file != f)
    if absent:
        problems.append(
            f"{len(absent)} tensors of the index are not in their shard, first {absent[0]}"
        )
    if unlisted := sorted(tensors.keys() - listed.keys()):
        problems.append(
            f"{len(unlisted)} tensors of the shards are not in the index, first {unlisted[0]}"
        )
    return problems
