"""Parity of a written ONNX folder with the fake-quantized reference, in ONNX Runtime."""

from __future__ import annotations

import numpy as np

from vlmq_export.errors import VlmqError
from vlmq_export.formats.base import Check, CheckSettings, FormatOptions, compare_weights, relative_error
from vlmq_export.formats.onnx.read import Linear, OnnxFolder, agreeing
from vlmq_export.formats.onnx.runner import OnnxRunner, session

FORMAT_GATE = 1e-5  # level 0 computes in float32: what is left is the order of additions (measured 1.5e-6)
KERNEL_GATE = 5e-2  # level 4 rounds activations to 8 bits (measured 1.8e-2)
LINEAR_GATE = 2e-6  # float32 accumulation against float64: 1e-6 at 4304 columns
LINEAR_ROWS = 16


def missing() -> str | None:
    """Packages that writing and checking need and that are not installed."""
    from importlib.util import find_spec

    lacking = [name for name in ("onnx", "onnx_ir", "mobius", "onnxruntime") if find_spec(name) is None]
    return ", ".join(lacking) or None


def check(folder, reference, options: FormatOptions, settings: CheckSettings) -> list[Check]:
    """Levels L1 to L3. What ONNX Runtime refuses becomes a failed row with its own words."""
    if lacking := missing():
        return [
            Check.not_run("onnx", level, "ONNX Runtime", f"{lacking} not installed") for level in ("L1", "L2", "L3")
        ]
    written = OnnxFolder(folder)
    rows = [_own_reader(written, reference)]
    stages = (("L1", _runtime_reader, (written, reference, settings)), ("L2", _linears, (written, reference, settings)),
              ("L3", _logits, (folder, written, reference, settings)))  # fmt: skip
    for level, stage, arguments in stages:
        try:
            rows += stage(*arguments)
        except VlmqError:
            raise
        except Exception as e:  # onnxruntime has no common class of errors that it exports
            line = " ".join(str(e).split())[:200]
            rows.append(Check("onnx", level, "ONNX Runtime", "failed", detail=f"stopped: {line}"))
    return rows


def _copies(name: str, reference) -> list[str]:
    """Hub names that must all hold the weight `name`: a tied head has no weight of its own."""
    tied = name == "model.embed_tokens.weight" and "lm_head.weight" not in reference.weights.names()
    return [name, "lm_head.weight"] if tied else [name]


def _own_reader(written: OnnxFolder, reference) -> Check:
    def read(name: str) -> np.ndarray | None:
        found = [written.weight(n) for n in _copies(name, reference)]
        return None if any(f is None for f in found) else agreeing(found)

    return compare_weights(
        "onnx", "weights by our reader", reference.weights.items(), read, count=reference.weights.count
    )


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

    name = "weights by ONNX Runtime (identity through each node)"
    return [compare_weights("onnx", name, reference.weights.items(), read, count=reference.weights.count)]


def _constant_through_runtime(written: OnnxFolder, tensor) -> np.ndarray:
    from onnx import TensorProto, helper

    graph = helper.make_graph(
        [helper.make_node("Identity", [tensor.name], ["value"])], "constant", [],
        [helper.make_tensor_value_info("value", TensorProto.FLOAT, list(tensor.dims))], [tensor],
    )  # fmt: skip
    return session(_serialized(graph), threads=1, folder=written.path).run(None, {})[0]


def _serialized(graph) -> bytes:
    from onnx import helper

    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def node_session(linear: Linear, *, accuracy_level: int, threads: int):
    """One MatMulNBits node of its own, from the file's constants; input "a" float32 [M, in], output "y"."""
    from onnx import TensorProto, helper, numpy_helper

    out_features = linear.weight.shape[0]
    constants = {"b": linear.weight, "scales": linear.scales, "zero_points": linear.zero_points}
    node = helper.make_node(
        "MatMulNBits", ["a", *constants], ["y"], domain="com.microsoft", K=linear.in_features, N=out_features,
        bits=linear.bits, block_size=linear.block_size, accuracy_level=accuracy_level,
    )  # fmt: skip
    graph = helper.make_graph(
        [node], "linear", [helper.make_tensor_value_info("a", TensorProto.FLOAT, ["m", linear.in_features])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", out_features])],
        [numpy_helper.from_array(np.ascontiguousarray(v), k) for k, v in constants.items()],
    )  # fmt: skip
    return session(_serialized(graph), threads=threads)


def identity_through_node(linear: Linear, threads: int, rows: int = 1024) -> np.ndarray:
    """float32 [out, in], original column order: what the runtime's kernel decodes at level 0."""
    node = node_session(linear, accuracy_level=0, threads=threads)
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


def _linears(written: OnnxFolder, reference, settings: CheckSettings) -> list[Check]:
    """Each node alone on random activations, against a float64 product with the reference's weights."""
    worst: dict[int, tuple[float, str]] = {0: (0.0, ""), 4: (0.0, "")}
    rng = np.random.default_rng(0)
    for name in reference.weights.linears:
        weights = reference.weights.array(f"{name}.weight").astype(np.float64)
        x = rng.standard_normal((LINEAR_ROWS, weights.shape[1])).astype(np.float32)
        exact = x.astype(np.float64) @ weights.T
        if name not in written.linears:
            worst[0] = (float("inf"), f"{name} (missing)")
            continue
        linear = written.linear(name)
        given = x if linear.order is None else x[:, linear.order]
        for level in worst:
            y = node_session(linear, accuracy_level=level, threads=settings.threads).run(["y"], {"a": given})[0]
            worst[level] = max(worst[level], (relative_error(y, exact), name))
    count = len(reference.weights.linears)
    detail = "float32 accumulation against a float64 product"
    return [
        Check.at_most("onnx", "L2", "each MatMulNBits at level 0", worst[0][0], LINEAR_GATE, unit="rel", compared=count,
                      detail=detail, worst=worst[0][1]),
        Check("onnx", "L2", "each MatMulNBits at level 4", "info", worst[4][0], unit="rel", compared=count,
              detail="int8 activations: what the fast kernel gives up", worst=worst[4][1]),
    ]  # fmt: skip


def _logits(folder, written: OnnxFolder, reference, settings: CheckSettings) -> list[Check]:
    """The whole model on held-out images, the reference's own pixels on both sides."""
    prompts = reference.prompts[: settings.images]
    vocabulary, count = reference.vocabulary, len(prompts)
    runner = OnnxRunner(folder, accuracy_level=0, threads=settings.threads)
    features, errors, different = [], [], []
    for p in prompts:
        positions = reference.position_ids(p)
        if p.pixel_values is not None:
            got = runner.features(p.pixel_values.numpy(), p.image_grid_thw.numpy())
            features.append((relative_error(got, reference.vision_features(p)), p.id))
        errors.append((relative_error(runner.logits(p, positions)[:, :vocabulary], reference.logits(p)), p.id))
        if runner.answer(p, positions, stop=reference.stop_ids, vocabulary=vocabulary) != reference.answer(p):
            different.append(p.id)
    first = prompts[0]
    positions, full = reference.position_ids(first), reference.logits(first)
    cached = runner.stepwise(first, positions, len(first.input_ids) // 2)[:, :vocabulary]
    rows = [
        Check.at_most("onnx", "L3", "image features", *_worst(features, FORMAT_GATE), unit="rel", compared=len(features),
                      detail="vision.onnx in float32", worst=max(features)[1]),
        Check.at_most("onnx", "L3", "logits at accuracy_level 0", *_worst(errors, FORMAT_GATE), unit="rel", compared=count,
                      detail="float32 throughout", worst=max(errors)[1]),
        Check.at_most("onnx", "L3", "cached decode against one forward", relative_error(cached, full), FORMAT_GATE,
                      unit="rel", compared=1, worst=first.id),
        Check.at_most("onnx", "L3", "greedy answers that differ", float(len(different)), 0.0, unit="answers", compared=count,
                      worst=", ".join(different[:8])),
    ]  # fmt: skip
    shipped = {written.linear(name).accuracy_level for name in written.linears}
    level = max(shipped)
    return rows if level == 0 else [*rows, *_shipped_level(folder, level, prompts, reference, settings)]


def _shipped_level(folder, level: int, prompts, reference, settings: CheckSettings) -> list[Check]:
    """The file as it is, where it asks for less than float32 activations."""
    runner = OnnxRunner(folder, threads=settings.threads)
    errors, agree, total = [], 0, 0
    for p in prompts:
        want = reference.logits(p)
        got = runner.logits(p, reference.position_ids(p))[:, : reference.vocabulary]
        errors.append((relative_error(got, want), p.id))
        agree += int((got.argmax(-1) == want.argmax(-1)).sum())
        total += len(want)
    return [
        Check.at_most("onnx", "L3", f"logits at accuracy_level {level}", *_worst(errors, KERNEL_GATE), unit="rel",
                      compared=len(prompts), detail="as shipped: int8 activations", worst=max(errors)[1]),
        Check("onnx", "L3", f"argmax agreement at accuracy_level {level}", "info", agree / total, unit="share", compared=total),
    ]  # fmt: skip


def _worst(errors: list[tuple[float, str]], gate: float) -> tuple[float, float]:
    return max(errors)[0], gate
