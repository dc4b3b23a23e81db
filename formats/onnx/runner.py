"""ONNX Runtime on a written folder: vision → embedding → text with KV cache, to raw logits and greedy answers."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import numpy as np

from vlmq_export.errors import MissingRuntime

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def available(provider: str) -> bool:
    """Whether the installed onnxruntime has this execution provider, cpu or cuda."""
    import onnxruntime as ort

    return PROVIDERS[provider] in ort.get_available_providers()


def session(model: Path | bytes, *, threads: int, folder: Path | None = None, provider: str = "cpu"):
    """A session with everything pinned that could change a result."""
    try:
        import onnxruntime as ort
    except ImportError as e:
        raise MissingRuntime(f"onnxruntime is not installed ({e}); pip install 'vlmq-export[onnx]'") from None
    if not available(provider):
        raise MissingRuntime(f"this onnxruntime has no {PROVIDERS[provider]}; pip install 'vlmq-export[onnx-gpu]'")
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    if folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    source = model if isinstance(model, bytes) else str(model)
    return ort.InferenceSession(source, options, providers=[PROVIDERS[provider]])


class OnnxRunner:
    """Batch of one unless the caller gives more. `accuracy_level` overrides the file's own, in memory."""

    def __init__(self, folder: Path, *, accuracy_level: int | None = None, threads: int = 1, provider: str = "cpu"):
        self.folder, self.accuracy_level, self.threads = Path(folder), accuracy_level, threads
        self.provider = provider

    @cached_property
    def vision(self):
        return session(self.folder / "vision.onnx", threads=self.threads, provider=self.provider)

    @cached_property
    def embedding(self):
        return session(self.folder / "embedding.onnx", threads=self.threads, provider=self.provider)

    @cached_property
    def text(self):
        path = self.folder / "text.onnx"
        if self.accuracy_level is None:
            return session(path, threads=self.threads, provider=self.provider)
        return session(
            with_accuracy_level(path, self.accuracy_level),
            threads=self.threads,
            folder=self.folder,
            provider=self.provider,
        )

    @cached_property
    def _dtype(self) -> type:
        """Of embeddings and cache."""
        return np.float16 if self.text.get_inputs()[0].type == "tensor(float16)" else np.float32

    @cached_property
    def _cache_shapes(self) -> dict[str, tuple[int, int]]:
        """Name → (heads, head size) of every past input."""
        return {
            i.name: (i.shape[1], i.shape[3]) for i in self.text.get_inputs() if i.name.startswith("past_key_values")
        }

    def features(self, pixel_values: np.ndarray, where: np.ndarray | None = None) -> np.ndarray:
        """float [image tokens, width]. `where`: image_grid_thw or image_sizes, if the family has one of them.

        A graph that takes image_sizes takes one image at a time, of one tile or of pixel_values [images, tiles, ...].
        """
        _, *more = (i.name for i in self.vision.get_inputs())
        if more != ["image_sizes"]:
            return self.vision.run(["image_features"], {"pixel_values": pixel_values, **dict.fromkeys(more, where)})[0]
        tiles = pixel_values if pixel_values.ndim == 5 else pixel_values[:, None]
        feeds = ({"pixel_values": t, "image_sizes": where[i : i + 1]} for i, t in enumerate(tiles))
        return np.concatenate([self.vision.run(["image_features"], f)[0] for f in feeds])

    def prompt_features(self, prompt) -> np.ndarray:
        """The features of every image of `prompt`, a calibration.Sample."""
        inputs = {k: v.numpy() for k, v in prompt.image_inputs().items()}
        return self.features(inputs["pixel_values"], inputs.get("image_grid_thw", inputs.get("image_sizes")))

    def embed(self, input_ids: np.ndarray, features: np.ndarray | None = None) -> np.ndarray:
        """float [B, S, hidden], image features at the image tokens in order."""
        if features is None:
            hidden = self.embedding.get_outputs()[0].shape[-1]
            features = np.zeros((0, hidden), self._dtype)
        return self.embedding.run(["inputs_embeds"], {"input_ids": input_ids, "image_features": features})[0]

    def step(
        self, embeds: np.ndarray, mask: np.ndarray, positions: np.ndarray, past: dict | None
    ) -> tuple[np.ndarray, dict]:
        """Logits float32 [B, S, vocabulary] and the cache after them."""
        if past is None:
            past = {n: np.zeros((embeds.shape[0], h, 0, d), self._dtype) for n, (h, d) in self._cache_shapes.items()}
        names = [o.name for o in self.text.get_outputs()]
        out = self.text.run(names, {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": positions, **past})
        present = {n.replace("present", "past_key_values"): v for n, v in zip(names[1:], out[1:])}
        return out[0].astype(np.float32, copy=False), present

    def prefill(self, prompt, positions: np.ndarray) -> tuple[np.ndarray, dict]:
        """One whole prompt: `prompt` is a calibration.Sample, `positions` int64 [3, 1, S], or [1, S] of one axis."""
        embeds = self._embed_prompt(prompt)
        return self.step(embeds, np.ones(embeds.shape[:2], np.int64), positions, None)

    def _embed_prompt(self, prompt) -> np.ndarray:
        """float [1, S, hidden], with the features of its images if it has any."""
        features = None if prompt.pixel_values is None else self.prompt_features(prompt)
        return self.embed(prompt.input_ids.numpy()[None], features)

    def logits(self, prompt, positions: np.ndarray) -> np.ndarray:
        """float32 [S, vocabulary]."""
        return self.prefill(prompt, positions)[0][0]

    def answer(self, prompt, positions: np.ndarray, *, stop: frozenset[int], limit: int = 16) -> list[int]:
        """Greedy token ids up to and without the stop token, decoded through the cache.

        From every row of the output, padding of the vocabulary included: so does each runtime, and the reference.
        """
        logits, past = self.prefill(prompt, positions)
        length, position, new = len(prompt.input_ids), int(positions.max()) + 1, []
        while len(new) < limit:
            token = int(logits[0, -1].argmax())
            if token in stop:
                break
            new.append(token)
            length += 1
            at = np.full_like(positions[..., :1], position)
            logits, past = self.step(self.embed(np.array([[token]])), np.ones((1, length), np.int64), at, past)
            position += 1
        return new

    def stepwise(self, prompt, positions: np.ndarray, split: int) -> np.ndarray:
        """The logits of `prompt` again, its tail from `split` on fed one token at a time through the cache."""
        embeds = self._embed_prompt(prompt)
        logits, past = self.step(embeds[:, :split], np.ones((1, split), np.int64), positions[..., :split], None)
        rows = [logits[0]]
        for i in range(split, embeds.shape[1]):
            mask = np.ones((1, i + 1), np.int64)
            logits, past = self.step(embeds[:, i : i + 1], mask, positions[..., i : i + 1], past)
            rows.append(logits[0])
        return np.concatenate(rows)


def with_accuracy_level(path: Path, level: int) -> bytes:
    """The graph with another accuracy_level in every MatMulNBits; its data stays where it is."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            for attribute in node.attribute:
                if attribute.name == "accuracy_level":
                    attribute.i = level
    return model.SerializeToString()
