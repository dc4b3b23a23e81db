"""The proof of a compressed-tensors folder: three decoders, every linear, and the whole model.

    L1  every weight by our reader; every linear by the library's decompressor; and every weight in
        the model that transformers loaded
    L2  each quantized linear alone
    L3  logits and greedy answers of transformers

The model is run in float32, with weights that the library decoded. What a user gets in float16 is
reported without a gate.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vlmq_export.errors import FormatError
from vlmq_export.formats.compressed_tensors.read import CompressedFolder
from vlmq_export.formats.compressed_tensors.requirements import missing
from vlmq_export.formats.contract import FormatOptions
from vlmq_export.formats.in_transformers.proof import rows
from vlmq_export.formats.in_transformers.proof.rows import AtWork, Program, own_decoder, rows_of
from vlmq_export.formats.proof.checks import Check, CheckSettings, Steps, compare_weights
from vlmq_export.formats.proof.reference import Reference

NAME = "compressed-tensors"
NEEDS = "pip install 'vlmq-export[compressed-tensors]'"
_DECOMPRESSED = "linears decoded by compressed-tensors' own decompressor"


def program(folder: CompressedFolder) -> Program:
    """transformers on a folder, loaded as its grids ask for."""
    family = folder.family
    loading = {
        "one_grid": len(folder.grids) == 1,
        "linears": [family.module_name(name) for name in folder.linears],
    }
    return Program(
        NAME,
        worker="vlmq_export.formats.compressed_tensors.proof.worker",
        library=NAME,
        exact="decoded to float32",
        widened="scales in float32",
        exact_loading=loading,
        usual_loading=loading,
        advice="load in bfloat16 or float32",
        usual_seconds=420.0,
    )


def at_work(
    folder: Path, reference: Reference, settings: CheckSettings
) -> AbstractContextManager[AtWork]:
    """transformers at work on a folder until the context ends. `check` takes what it leaves.

    Raises FormatError when the folder cannot be opened.
    """
    return rows.at_work(program(CompressedFolder(folder)), folder, reference, settings)


def check(
    folder: Path,
    reference: Reference,
    options: FormatOptions,
    settings: CheckSettings,
    begun: AtWork | None = None,
) -> list[Check]:
    """All rows. A check that fails or cannot run is a row too.

    begun: where the runtime is at work already, because other formats were checked meanwhile.

    Raises FormatError when the folder cannot be opened.
    """
    steps = Steps(settings.tell, rows.PARTS)
    steps.begin("weights")
    opened = CompressedFolder(folder)
    how = program(opened)
    found = [own_decoder(opened, reference)]
    if lacking := missing():
        why = f"{lacking} not installed; {NEEDS}"
        return [*found, Check.not_run(NAME, "L1", _DECOMPRESSED, why), *how.not_run(why)]
    found.append(library_decoder(opened, reference))
    if why := reference.too_large:
        return found + how.not_run(why)
    return found + rows_of(how, opened, reference, settings, steps, begun)


def library_decoder(folder: CompressedFolder, reference: Reference) -> Check:
    """Every quantized linear by the decompressor of the library, with its scales in float32."""
    weights = reference.weights
    count = sum(int(np.prod(weights.shape(f"{n}.weight"))) for n in weights.linears)
    expected = ((f"{n}.weight", weights.array(f"{n}.weight")) for n in weights.linears)

    def read(weight: str) -> np.ndarray | None:
        stored = folder.stored_name(weight.removesuffix(".weight"))
        if f"{stored}.weight_packed" not in folder.tensors:
            return None
        return decompress(folder, stored)

    # The last three are what its tensor code raises on damaged parts.
    try:
        return compare_weights(NAME, _DECOMPRESSED, expected, read, count=count)
    except (FormatError, RuntimeError, LookupError, ValueError) as e:
        return Check(
            NAME, "L1", _DECOMPRESSED, "failed", detail=str(e).splitlines()[0], unit="mismatches"
        )


def decompress(folder: CompressedFolder, module: str) -> np.ndarray:
    """The weights of the linear `module` of the file, by the library: float32 [N, K].

    Its scheme is read from config.json by the library too. Raises FormatError where it leaves the
    linear float, and what its code raises.
    """
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
    from compressed_tensors.utils import match_name, match_targets

    stated = QuantizationConfig.model_validate(folder.quantization)
    schemes = [s for s in stated.config_groups.values() if isinstance(s, QuantizationScheme)]
    by_target = {target: scheme for scheme in schemes for target in scheme.targets}
    linear = torch.nn.Linear(1, 1, device="meta")  # its class may be a target
    if any(match_name(module, pattern) for pattern in stated.ignore or []):
        raise FormatError(f"config.json ignores {module}, which has integers")
    # They come with the most specific first.
    scheme = by_target[match_targets(module, linear, by_target)[0]]
    parts = folder.parts[: 3 if folder.grid_of(module).symmetric else 4]
    state: dict[str, torch.Tensor] = {part: folder.raw(f"{module}.{part}") for part in parts}
    state["weight_scale"] = state["weight_scale"].float()
    of_layout: Any = BaseCompressor.get_value_from_registry(stated.format)
    return of_layout.decompress(state, scheme)["weight"].numpy()
