"""L1: the rotary tables of the graphs, at every position that they store.

mobius stores cosines and sines as constants. They are no weights of the model, and prompts reach
only their first rows. A file with a wrong row could therefore pass every other check, and fail on
a long prompt. Graphs that are traced by torch store the frequencies alone.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from vlmq_export.formats.onnx.read import OnnxFolder
from vlmq_export.formats.proof.checks import Check
from vlmq_export.formats.proof.reference import Reference

# In units of 2⁻²³ of the angle. Power, reciprocal, product and the reference's own frequency are
# each rounded to float32; measured was 1.5. A wrong exponent, sign or row is off by thousands of
# units. A wrong last bit cannot be told from rounding.
TABLE_GATE = 4.0
_FREQUENCIES = "text.rotary."  # beginning of the names of a traced graph's frequencies
# Table of a graph of mobius → what it holds of each angle.
_TABLES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "decoder.model.rotary_emb.cos_cache": np.cos,
    "decoder.model.rotary_emb.sin_cache": np.sin,
    "vision_encoder.visual.rotary_pos_emb.freq_table": lambda angles: angles,
}


def rotary_tables(written: OnnxFolder, reference: Reference) -> list[Check]:
    """A row for tables or frequencies, and one for the axes where the graph has them as numbers.

    A table that is missing, too short or of another width is a failure.
    """
    if any(name.startswith(_FREQUENCIES) for name in written.floats):
        return [_frequencies(written, reference)]
    model = reference.model.model
    text = model.language_model.rotary_emb.inv_freq.double().numpy()  # [head size / 2]
    vision = model.visual.rotary_pos_emb.inv_freq.double().numpy()
    positions = int(reference.architecture.text["max_position_embeddings"])
    worst, where, compared = 0.0, "", 0
    for name, function in _TABLES.items():
        table = written.weight(name)  # [positions, frequencies]
        frequencies, least = (vision, 1) if name.startswith("vision") else (text, positions)
        if table is None:
            return [_row(np.inf, compared, f"{name} (missing)")]
        if table.ndim != 2 or table.shape[1] != len(frequencies) or len(table) < least:
            return [_row(np.inf, compared, f"{name} ({list(table.shape)})")]
        units = _units(table, frequencies, function)
        compared += units.size
        if units.max() >= worst:
            worst = float(units.max())
            where = f"{name} at position {int(units.max(axis=1).argmax())}"
    return [_row(worst, compared, where), *_axes(written, reference)]


def _units(
    table: np.ndarray,  # float32 or float16 [positions, frequencies]
    frequencies: np.ndarray,  # float64 [frequencies]
    function: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:
    """The error of each entry in units of its rounding, which grows with the angle. NaN is ∞."""
    angles = np.arange(len(table))[:, None] * frequencies
    rounding = 2.0**-11 if table.dtype == np.float16 else 2.0**-23
    units = np.abs(table.astype(np.float64) - function(angles)) / (rounding + 2.0**-23 * angles)
    return np.where(np.isnan(units), np.inf, units)


def _row(worst: float, compared: int, where: str) -> Check:
    return Check.at_most(
        "onnx",
        "L1",
        "rotary tables at every position",
        worst,
        TABLE_GATE,
        unit="roundings",
        compared=compared,
        detail="cosines, sines and angles from the reference's frequencies",
        worst=where,
    )


def _axes(written: OnnxFolder, reference: Reference) -> list[Check]:
    """Which of the three positions turns each frequency: as config.json has it.

    No row where the graph does not say so in numbers.
    """
    sections = reference.architecture.text["rope_parameters"]["mrope_section"]
    graph = written.models["text"].graph
    found = {
        n.name: list(a.ints)
        for n in graph.node
        if n.op_type == "MRotaryEmbedding"
        for a in n.attribute
        if a.name == "mrope_section"
    }
    want = {key: list(sections) for key in found}
    for tensor in graph.initializer:
        if tensor.name == "rotary.axis":
            found[tensor.name] = written.array(tensor).tolist()
            want[tensor.name] = np.repeat(np.arange(len(sections)), sections).tolist()
    if not found:
        return []
    wrong = [name for name in found if found[name] != want[name]]
    return [
        Check.at_most(
            "onnx",
            "L1",
            "axes of the rotary frequencies",
            float(len(wrong)),
            0.0,
            unit="constants that differ",
            compared=len(found),
            detail="mrope_section of config.json",
            worst=", ".join(wrong[:4]),
        )
    ]


def _frequencies(written: OnnxFolder, reference: Reference) -> Check:
    """The frequencies of a traced graph, bit for bit those of the reference.

    They have the names of the model's own buffers. Gemma 3 has one for each kind of layer.
    """
    buffers = reference.model.get_decoder().rotary_emb.named_buffers()
    wanted = {
        f"{_FREQUENCIES}{name}": buffer
        for name, buffer in buffers
        if name.endswith("inv_freq") and "original" not in name
    }
    if visual := getattr(reference.model.model, "visual", None):
        # Other towers have learned positions.
        wanted["vision.inv_freq"] = visual.rotary_pos_emb.inv_freq
    elif reference.architecture.family.packed:
        tower = reference.model.model.vision_tower
        wanted["vision.inv_freq"] = tower.patch_positional_embedding.inv_freq
    wrong, compared = [], 0
    for name, buffer in wanted.items():
        want, got = buffer.numpy(), written.weight(name)
        compared += want.size
        if got is None or not np.array_equal(got, want):
            wrong.append(name)
    return Check.at_most(
        "onnx",
        "L1",
        "rotary frequencies",
        float(len(wrong)),
        0.0,
        unit="constants that differ",
        compared=compared,
        detail="the reference's own, bit for bit",
        worst=", ".join(wrong),
    )
