"""Rotary tables of the graphs against the reference's own frequencies, at every position that they store.

mobius stores the tables as constants. They are no weights of the model, and prompts reach only their first rows: without
a look at all of them a file could pass every other check and fail on a long prompt.
"""

from __future__ import annotations

import numpy as np

from vlmq_export.formats.base import Check
from vlmq_export.formats.onnx.read import OnnxFolder

# In units of 2⁻²³ of the angle: power, reciprocal, product and the reference's own frequency are each rounded to float32
# (measured 1.5). A changed exponent, sign or row is thousands of units; a changed last bit cannot be told from rounding.
TABLE_GATE = 4.0
# torch_graphs compute cosines and sines of any position from these, which must be the reference's bit for bit.
_FREQUENCIES = {"text.rotary.inv_freq": "language_model.rotary_emb", "vision.inv_freq": "visual.rotary_pos_emb"}
_TABLES = {
    "decoder.model.rotary_emb.cos_cache": np.cos,
    "decoder.model.rotary_emb.sin_cache": np.sin,
    "vision_encoder.visual.rotary_pos_emb.freq_table": lambda angles: angles,
}


def rotary_tables(written: OnnxFolder, reference) -> list[Check]:
    """One L1 row. A table that is missing, too short or of another width is a failure."""
    if written.weight("text.rotary.inv_freq") is not None:
        return [_frequencies(written, reference)]
    text = reference.model.model.language_model.rotary_emb.inv_freq.double().numpy()  # [head_dim / 2]
    vision = reference.model.model.visual.rotary_pos_emb.inv_freq.double().numpy()
    needed = int((reference.config.get("text_config") or reference.config)["max_position_embeddings"])
    worst, where, compared = 0.0, "", 0
    for name, function in _TABLES.items():
        table = written.weight(name)  # float32 [positions, frequencies]
        frequencies, rows = (vision, 1) if name.startswith("vision") else (text, needed)
        if table is None or table.ndim != 2 or table.shape[1] != len(frequencies) or len(table) < rows:
            return [_row(np.inf, compared, f"{name} ({'missing' if table is None else list(table.shape)})")]
        angles = np.arange(len(table))[:, None] * frequencies
        rounding = 2.0**-11 if table.dtype == np.float16 else 2.0**-23
        units = np.abs(table.astype(np.float64) - function(angles)) / (rounding + 2.0**-23 * angles)
        units = np.where(np.isnan(units), np.inf, units)
        compared += units.size
        if units.max() >= worst:
            worst, where = float(units.max()), f"{name} at position {int(units.max(axis=1).argmax())}"
    return [_row(worst, compared, where), *_axes(written, reference)]


def _axes(written: OnnxFolder, reference) -> list[Check]:
    """Which of the three positions turns each frequency, where the graph says so in numbers: as the config's sections."""
    text = reference.config.get("text_config") or reference.config
    sections = (text.get("rope_parameters") or text.get("rope_scaling"))["mrope_section"]
    graph = written.models["text"].graph
    found = {n.name: list(a.ints) for n in graph.node if n.op_type == "MRotaryEmbedding" for a in n.attribute
             if a.name == "mrope_section"}  # fmt: skip
    want = {key: list(sections) for key in found}
    for tensor in graph.initializer:
        if tensor.name == "rotary.axis":
            found[tensor.name] = written.array(tensor).tolist()
            want[tensor.name] = np.repeat(np.arange(len(sections)), sections).tolist()
    if not found:
        return []
    wrong = [name for name in found if found[name] != want[name]]
    return [
        Check.at_most("onnx", "L1", "axes of the rotary frequencies", float(len(wrong)), 0.0, unit="constants that differ",
                      compared=len(found), detail="mrope_section of config.json", worst=", ".join(wrong[:4]))
    ]  # fmt: skip


def _frequencies(written: OnnxFolder, reference) -> Check:
    wrong, compared = [], 0
    for name, module in _FREQUENCIES.items():
        if name.startswith("vision") and not hasattr(reference.model.model, "visual"):
            continue  # learned positions
        want, got = reference.model.model.get_submodule(module).inv_freq.numpy(), written.weight(name)
        compared += want.size
        if got is None or not np.array_equal(got, want):
            wrong.append(name)
    return Check.at_most(
        "onnx", "L1", "rotary frequencies", float(len(wrong)), 0.0, unit="constants that differ", compared=compared,
        detail="the reference's own, bit for bit", worst=", ".join(wrong),
    )  # fmt: skip


def _row(worst: float, compared: int, where: str) -> Check:
    return Check.at_most(
        "onnx", "L1", "rotary tables at every position", worst, TABLE_GATE, unit="roundings", compared=compared,
        detail="cosines, sines and angles from the reference's frequencies", worst=where,
    )  # fmt: skip
