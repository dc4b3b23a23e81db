"""Parity of a written ONNX folder with the fake-quantized reference, in ONNX Runtime."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from vlmq_export.errors import VlmqError
from vlmq_export.formats.base import Check, CheckSettings, FormatOptions, answers_row, compare_weights, relative_error
from vlmq_export.formats.onnx.genai_check import genai_rows
from vlmq_export.formats.onnx.read import Linear, OnnxFolder, agreeing
from vlmq_export.formats.onnx.runner import PROVIDERS, OnnxRunner, available, session
from vlmq_export.formats.onnx.tables import rotary_tables

FORMAT_GATE = 1e-5  # level 0 computes in float32: what is left is the order of additions (measured 1.5e-6)
HALF_GATE = 5e-3  # float16 activations and cache: 11 bits a value (measured 6.0e-4 on the reference VLM)
HALF_ANSWERS = 0.05  # share of greedy answers that a float16 decoder may change
KERNEL_GATE = 5e-2  # level 4 rounds activations to 8 bits (measured 1.8e-2)
OLDEST = (1, 31)  # of ONNX Runtime: what every figure here was measured with
LINEAR_ROWS = 16


def linear_gate(in_features: int) -> float:
    """Relative error that float32 additions may cost a product over `in_features` columns: 2⁻²⁴·√in.

    One running sum of K random terms rounds K times by at most 2⁻²⁴ of a partial sum that grows as √i; independent
    roundings add up to 2⁻²⁴·√(K/6). Measured at K = 512 to 29568: 0.28 to 0.33 of the gate at 4 bits, less at 2 and 8.
    """
    return 2.0**-24 * math.sqrt(in_features)


def missing() -> str | None:
    """Packages that writing and checking need and that are not installed, or not in a version that can run the files."""
    from importlib.util import find_spec

    if old := too_old_runtime():
        return old
    lacking = [name for name in ("onnx", "onnx_ir", "onnxscript", "mobius", "onnxruntime") if find_spec(name) is None]
    return ", ".join(lacking) or None


def too_old_runtime() -> str | None:
    """The onnxruntime that is asked for where an older one is installed: it lacks operators or computes them otherwise."""
    from importlib.metadata import PackageNotFoundError, version

    for name in ("onnxruntime", "onnxruntime-gpu"):
        try:
            major, minor = (int(part) for part in version(name).split(".")[:2])
        except (PackageNotFoundError, ValueError):
            continue
        if (major, minor) < OLDEST:
            return f"{name}>={OLDEST[0]}.{OLDEST[1]} (here is {version(name)})"
    return None


def check(folder, reference, options: FormatOptions, settings: CheckSettings) -> list[Check]:
    """Levels L1 to L3. What ONNX Runtime refuses becomes a failed row with its own words."""
    if lacking := missing():
        return [
            Check.not_run("onnx", level, "ONNX Runtime", f"{lacking} not installed") for level in ("L1", "L2", "L3")
        ]
    written = OnnxFolder(folder)
    rows: list[Check] = []
    provider = options.onnx_provider
    stages = (("L1", _own_reader, (written, reference)), ("L1", _runtime_reader, (written, reference, settings)),
              ("L1", rotary_tables, (written, reference)), ("L2", _linears, (written, reference, settings, provider)),
              ("L3", _logits, (folder, written, reference, settings, provider)),
              ("L3", genai_rows, (folder, reference, settings, max(written.accuracy_levels), FORMAT_GATE)))  # fmt: skip
    for level, stage, arguments in stages:
        if reference.too_large and stage in (rotary_tables, _logits, genai_rows):
            rows.append(Check.not_run("onnx", level, "tables" if level == "L1" else "whole model", reference.too_large))
            continue
        if level != "L1" and not available(provider):
            rows.append(Check.not_run("onnx", level, f"ONNX Runtime on {provider}", f"no {PROVIDERS[provider]} here"))
            continue
        try:
            rows += stage(*arguments)
        except VlmqError:
            raise
        except Exception as e:  # onnxruntime has no common class of errors that it exports
            line = " ".join(str(e).replace(f"{folder}/", "").split())[:200]  # file names without this machine's folders
            rows.append(Check("onnx", level, "ONNX Runtime", "failed", detail=f"stopped: {line}"))
    return rows


def _copies(name: str, reference) -> list[str]:
    """Hub names that must all hold the weight `name`: a tied head has no weight of its own."""
    own_head = any(n.endswith("lm_head.weight") for n in reference.weights.names())
    tied = name.endswith("embed_tokens.weight") and not own_head
    return [name, "lm_head.weight"] if tied else [name]


def _own_reader(written: OnnxFolder, reference) -> list[Check]:
    def read(name: str) -> np.ndarray | None:
        found = [written.weight(n) for n in _copies(name, reference)]
        return None if any(f is None for f in found) else agreeing(found)

    return [_compare("weights by our reader", written, reference, read)]


def _compare(name: str, written: OnnxFolder, reference, read) -> Check:
    """Floats that the file holds in float16 are held against the reference's rounded to it; integers never change."""
    items = ((n, want.astype(written.stored_as(n), copy=False)) for n, want in reference.weights.items())
    detail = "float weights against the reference's rounded to float16" if written.half else ""
    return compare_weights("onnx", name, items, read, count=reference.weights.count, detail=detail)


def _runtime_reader(written: OnnxFolder, reference, settings: CheckSettings) -> list[Check]:
    """The identity through each node returns what the runtime decodes; float constants come back as outputs."""

    def read(name: str) -> np.ndarray | None:
        module = name.removesuffix(".weight")
        if module in written.linears:
            return identity_through_node(written.linear(module), settings.threads)
        names = _copies(name, reference)
        if any(n not in written.floats for n in names):
            return None
        return agreeing([_constant_through_runtime(written, t) for n in names for t in written.floats[n]])

    return [_compare("weights by ONNX Runtime (identity through each node)", written, reference, read)]


def _constant_through_runtime(written: OnnxFolder, tensor) -> np.ndarray:
    from onnx import helper

    graph = helper.make_graph(
        [helper.make_node("Identity", [tensor.name], ["value"])], "constant", [],
        [helper.make_tensor_value_info("value", tensor.data_type, list(tensor.dims))], [tensor],
    )  # fmt: skip
    return session(_serialized(graph), threads=1, folder=written.path).run(None, {})[0]


def _serialized(graph) -> bytes:
    from onnx import helper

    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def node_session(linear: Linear, *, accuracy_level: int, threads: int, provider: str = "cpu"):
    """One MatMulNBits node of its own, from the file's constants; input "a" [M, in] of the scales' type, output "y"."""
    from onnx import helper, numpy_helper

    out_features, kind = linear.weight.shape[0], helper.np_dtype_to_tensor_dtype(linear.scales.dtype)
    constants = {"b": linear.weight, "scales": linear.scales, "zero_points": linear.zero_points}
    node = helper.make_node(
        "MatMulNBits", ["a", *constants], ["y"], domain="com.microsoft", K=linear.in_features, N=out_features,
        bits=linear.bits, block_size=linear.block_size, accuracy_level=accuracy_level,
    )  # fmt: skip
    graph = helper.make_graph(
        [node], "linear", [helper.make_tensor_value_info("a", kind, ["m", linear.in_features])],
        [helper.make_tensor_value_info("y", kind, ["m", out_features])],
        [numpy_helper.from_array(np.ascontiguousarray(v), k) for k, v in constants.items()],
    )  # fmt: skip
    return session(_serialized(graph), threads=threads, provider=provider)


def identity_through_node(linear: Linear, threads: int, rows: int = 1024) -> np.ndarray:
    """float32 [out, in], original column order: what the runtime's kernel decodes at level 0.

    Scales are widened to float32, or a float16 output would round what is decoded.
    """
    wide = replace(linear, scales=linear.scales.astype(np.float32))
    node = node_session(wide, accuracy_level=0, threads=threads)
    sorted_ = np.empty((linear.weight.shape[0], linear.in_features), np.float32)
    for start in range(0, linear.in_features, rows):
        stop = min(start + rows, linear.in_features)
        eye = np.zeros((stop - start, linear.in_features), np.float32)
        eye[np.arange(stop - start), np.arange(start, stop)] = 1
        sorted_[:, start:stop] = node.run(["y"], {"a": eye})[0].T
    if linear.order is None:
        return sorted_
    weights = np.empty_like(sorted_)
    weights[:, linear.order] = sorted_
    return weights


def _linears(written: OnnxFolder, reference, settings: CheckSettings, provider: str) -> list[Check]:
    """Each node alone on random activations, against a float64 product with the reference's weights."""
    errors: dict[int, list[tuple[float, str, float]]] = {0: [], 4: []}  # level → (error, linear, gate)
    rng = np.random.default_rng(0)
    for name in reference.weights.linears:
        weights = reference.weights.array(f"{name}.weight").astype(np.float64)
        x = rng.standard_normal((LINEAR_ROWS, weights.shape[1])).astype(np.float32)
        if name not in written.linears:
            errors[0].append((math.inf, f"{name} (missing)", 0.0))
            continue
        linear = written.linear(name)
        x = x.astype(linear.scales.dtype)
        given = x if linear.order is None else x[:, linear.order]
        gate = linear_gate(weights.shape[1]) + (2.0**-11 if written.half else 0)  # the output's own rounding
        for level, found in errors.items():
            y = node_session(linear, accuracy_level=level, threads=settings.threads, provider=provider).run(
                ["y"], {"a": given}
            )[0]
            found.append((relative_error(y, x.astype(np.float64) @ weights.T), name, gate))
    error, name, gate = max(errors[0], key=lambda e: _rank(e[0] / e[2] if e[2] else math.inf))  # nearest its own gate
    half = " + 2⁻¹¹ of a float16 output" if written.half else ""
    rows = [
        Check.at_most("onnx", "L2", "each MatMulNBits at level 0", error, gate, unit="rel", compared=len(errors[0]),
                      detail=f"float32 accumulation against a float64 product: 2⁻²⁴·√in{half}", worst=name)
    ]  # fmt: skip
    if errors[4]:
        error, name, _ = max(errors[4], key=lambda e: _rank(e[0]))
        detail = "int8 activations: what the fast kernel gives up"
        rows.append(Check("onnx", "L2", "each MatMulNBits at level 4", "info", error, unit="rel",
                          compared=len(errors[4]), detail=detail, worst=name))  # fmt: skip
    return rows


def _logits(folder, written: OnnxFolder, reference, settings: CheckSettings, provider: str) -> list[Check]:
    """The whole model on held-out images, the reference's own pixels on both sides."""
    prompts = reference.prompts[: settings.images]
    if not prompts:
        return [Check.not_run("onnx", "L3", "logits at accuracy_level 0", "no held-out prompts")]
    vocabulary, count = reference.vocabulary, len(prompts)
    level = max(written.accuracy_levels)
    # A file of level 0 is run as it lies; another one with the attribute rewritten in memory.
    runner = OnnxRunner(folder, accuracy_level=0 if level else None, threads=settings.threads, provider=provider)
    gate, allowed = (HALF_GATE, math.floor(HALF_ANSWERS * count)) if written.half else (FORMAT_GATE, 0)
    features, errors, agree, verdicts = [], [], [], {}
    for p in prompts:
        positions = reference.position_ids(p)
        if p.pixel_values is not None:
            want = np.concatenate([reference.vision_features(p), *reference.added_features(p)], axis=-1)
            features.append((relative_error(runner.prompt_features(p), want), p.id))
        got, want = runner.logits(p, positions)[:, :vocabulary], reference.logits(p)
        errors.append((relative_error(got, want), p.id))
        agree.append(got.argmax(-1) == want.argmax(-1))
        verdicts[p.id] = reference.judge(p, runner.answer(p, positions, stop=reference.stop_ids), FORMAT_GATE)
    first = prompts[0]
    positions, full = reference.position_ids(first), reference.logits(first)
    cached = runner.stepwise(first, positions, len(first.input_ids) // 2)[:, :vocabulary]
    kind = "float16 activations and cache" if written.half else "float32 throughout"
    rows = [
        _at_most("image features", features, gate, "vision.onnx computes in float32"),
        _at_most("logits at accuracy_level 0", errors, gate, kind),
        Check.at_most("onnx", "L3", "cached decode against one forward", relative_error(cached, full), gate,
                      unit="rel", compared=1, worst=first.id),
        answers_row("onnx", "greedy answers that differ", verdicts, float(allowed)),
    ]  # fmt: skip
    if written.half:
        rows.append(_agreement(0, np.concatenate(agree)))
    return rows if level == 0 else [*rows, *_shipped_level(folder, level, prompts, reference, settings, provider)]


def _shipped_level(folder, level: int, prompts, reference, settings: CheckSettings, provider: str) -> list[Check]:
    """The file as it is, where it asks for less than float32 activations."""
    runner = OnnxRunner(folder, threads=settings.threads, provider=provider)
    errors, agree = [], []
    for p in prompts:
        want = reference.logits(p)
        got = runner.logits(p, reference.position_ids(p))[:, : reference.vocabulary]
        errors.append((relative_error(got, want), p.id))
        agree.append(got.argmax(-1) == want.argmax(-1))
    return [
        _at_most(f"logits at accuracy_level {level}", errors, KERNEL_GATE, "as shipped: int8 activations"),
        _agreement(level, np.concatenate(agree)),
    ]  # fmt: skip


def _agreement(level: int, same: np.ndarray) -> Check:
    """`same`: bool a position, whether its most likely token is the reference's."""
    name = f"argmax agreement at accuracy_level {level}"
    return Check("onnx", "L3", name, "info", float(same.mean()), unit="share", compared=len(same))


def _at_most(name: str, errors: list[tuple[float, str]], gate: float, detail: str) -> Check:
    """One L3 row over (error, prompt) pairs; without a pair there is nothing that could have passed."""
    if not errors:
        return Check.not_run("onnx", "L3", name, "no held-out prompt has an image")
    error, prompt = max(errors, key=lambda e: _rank(e[0]))
    return Check.at_most("onnx", "L3", name, error, gate, unit="rel", compared=len(errors), detail=detail, worst=prompt)


def _rank(error: float) -> float:
    """Order of errors with NaN above every number: max() alone passes over it."""
    return math.inf if math.isnan(error) else error
