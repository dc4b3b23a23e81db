"""Runs a written folder in ONNX Runtime, to raw logits and greedy answers.

vision.onnx gives the features of the images, embedding.onnx puts them among the embeddings of the
text, and text.onnx decodes with a KV cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from vlmq_export.errors import MissingRuntime
from vlmq_export.quantizer.samples.sample import Sample

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
FEATURES = "image_features"
Cache = dict[str, np.ndarray]  # name of a past input → its value, with a row for each prompt


def available(provider: str) -> bool:
    """Whether the installed onnxruntime has this execution provider, cpu or cuda."""
    import onnxruntime as ort

    return PROVIDERS[provider] in ort.get_available_providers()


def session(
    model: Path | bytes,
    *,
    threads: int,
    folder: Path | None = None,  # where the data of a graph given as bytes lie
    provider: str = "cpu",
) -> InferenceSession:
    """A session in which everything is pinned that could change a result.

    Raises MissingRuntime without onnxruntime or the execution provider, and whatever the runtime
    raises for a graph that it refuses.
    """
    try:
        import onnxruntime as ort
    except ImportError as e:
        raise MissingRuntime(
            f"onnxruntime is not installed ({e}); pip install 'vlmq-export[onnx]'"
        ) from None
    if not available(provider):
        raise MissingRuntime(
            f"this onnxruntime has no {PROVIDERS[provider]}; pip install 'vlmq-export[onnx-gpu]'"
        )
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    if folder is not None:
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(folder)
        )
    source = model if isinstance(model, bytes) else str(model)
    return ort.InferenceSession(source, options, providers=[PROVIDERS[provider]])


def run(
    graph: InferenceSession, feeds: Mapping[str, np.ndarray], names: list[str] | None = None
) -> list[np.ndarray]:
    """The outputs of these names, or all. In general an output can also be a sequence or a map."""
    return cast(list[np.ndarray], graph.run(names, dict(feeds)))


class OnnxRunner:
    """A folder in ONNX Runtime. A batch has one prompt unless the caller gives more.

    accuracy_level: takes the place of the file's own, in memory.
    """

    def __init__(
        self,
        folder: Path,
        *,
        accuracy_level: int | None = None,
        threads: int = 1,
        provider: str = "cpu",
    ):
        self.folder, self.accuracy_level, self.threads = Path(folder), accuracy_level, threads
        self.provider = provider

    @cached_property
    def vision(self) -> InferenceSession:
        """The session of vision.onnx."""
        return session(self.folder / "vision.onnx", threads=self.threads, provider=self.provider)

    @cached_property
    def embedding(self) -> InferenceSession:
        """The session of embedding.onnx."""
        return session(self.folder / "embedding.onnx", threads=self.threads, provider=self.provider)

    @cached_property
    def text(self) -> InferenceSession:
        """The session of text.onnx."""
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
        """The numpy type of embeddings and cache."""
        return np.float16 if self.text.get_inputs()[0].type == "tensor(float16)" else np.float32

    def empty_cache(self, batch: int, length: int = 0) -> Cache:
        """Zeros for every past input, in its type.

        Keys and values are [B, heads, length, head size]; a linear attention's states have a shape
        that is the same for every length.
        """
        types = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
        return {
            i.name: np.zeros(
                [batch, *(n if isinstance(n, int) else length for n in i.shape[1:])], types[i.type]
            )
            for i in self.text.get_inputs()
            if i.name.startswith("past_key_values")
        }

    def features(self, pixel_values: np.ndarray, where: np.ndarray | None = None) -> np.ndarray:
        """The features of images, float [image tokens, width].

        where: image_grid_thw or image_sizes, in a family that has one of them.

        A graph that takes pixels alone takes images of one size. Those that image_sizes says are
        smaller than pixel_values go in one by one, without what fills them up. A graph that takes
        image_sizes too takes one image at a time. pixel_values has an image of one tile in each row
        then, or is [images, tiles, ...].
        """
        _, *more = (i.name for i in self.vision.get_inputs())
        if not more and where is not None:
            images = [x[None, :, :h, :w] for x, (h, w) in zip(pixel_values, where.tolist())]
            runs = [run(self.vision, {"pixel_values": x}, [FEATURES])[0] for x in images]
            return np.concatenate(runs)
        if not more:
            return run(self.vision, {"pixel_values": pixel_values}, [FEATURES])[0]
        assert where is not None, f"the graph takes {more[0]}"
        if more != ["image_sizes"]:
            feeds = {"pixel_values": pixel_values, **dict.fromkeys(more, where)}
            return run(self.vision, feeds, [FEATURES])[0]
        tiles = pixel_values if pixel_values.ndim == 5 else pixel_values[:, None]
        parts = []
        for i, image in enumerate(tiles):
            feeds = {"pixel_values": image, "image_sizes": where[i : i + 1]}
            parts.append(run(self.vision, feeds, [FEATURES])[0])
        return np.concatenate(parts)

    def prompt_features(self, prompt: Sample) -> np.ndarray:
        """The features of every image of a prompt, float [image tokens, width]."""
        inputs = {k: v.numpy() for k, v in prompt.image_inputs().items()}
        where = inputs.get("image_grid_thw", inputs.get("image_sizes"))
        return self.features(inputs["pixel_values"], where)

    def embed(self, input_ids: np.ndarray, features: np.ndarray | None = None) -> np.ndarray:
        """The embeddings of tokens [B, S], with image features at the image tokens in order.

        float [B, S, hidden].
        """
        if features is None:
            width = next(i.shape[-1] for i in self.embedding.get_inputs() if i.name == FEATURES)
            features = np.zeros((0, width), self._dtype)
        feeds = {"input_ids": input_ids, FEATURES: features}
        return run(self.embedding, feeds, ["inputs_embeds"])[0]

    def step(
        self,
        embeds: np.ndarray,  # float [B, S, hidden]
        mask: np.ndarray,  # int64 [B, cached and new tokens]
        positions: np.ndarray,  # int64 [3, B, S], or [B, S] of one axis
        past: Cache | None,
    ) -> tuple[np.ndarray, Cache]:
        """Logits float32 [B, S, vocabulary], and the cache after these tokens."""
        past = self.empty_cache(embeds.shape[0]) if past is None else past
        names = [o.name for o in self.text.get_outputs()]
        feeds = {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": positions, **past}
        logits, *values = run(self.text, feeds, names)
        present = {n.replace("present", "past_key_values"): v for n, v in zip(names[1:], values)}
        return logits.astype(np.float32, copy=False), present

    def prefill(self, prompt: Sample, positions: np.ndarray) -> tuple[np.ndarray, Cache]:
        """Logits float32 [1, S, vocabulary] of a whole prompt, and the cache after it.

        positions: int64 [3, 1, S], or [1, S] of one axis.
        """
        embeds = self._embed_prompt(prompt)
        return self.step(embeds, np.ones(embeds.shape[:2], np.int64), positions, None)

    def _embed_prompt(self, prompt: Sample) -> np.ndarray:
        """float [1, S, hidden], with the features of the images if there are any."""
        features = None if prompt.pixel_values is None else self.prompt_features(prompt)
        return self.embed(prompt.input_ids.numpy()[None], features)

    def logits(self, prompt: Sample, positions: np.ndarray) -> np.ndarray:
        """float32 [S, vocabulary], of every position of the prompt."""
        return self.prefill(prompt, positions)[0][0]

    def answer(
        self, prompt: Sample, positions: np.ndarray, *, stop: frozenset[int], limit: int = 16
    ) -> list[int]:
        """Greedy token ids, at most `limit`, up to and without the stop token.

        They are decoded one by one through the cache. Every row of the output takes part, padding
        of the vocabulary included, as it does in each runtime and in the reference.
        """
        logits, past = self.prefill(prompt, positions)
        length, position = len(prompt.input_ids), int(positions.max()) + 1
        new: list[int] = []
        while len(new) < limit:
            token = int(logits[0, -1].argmax())
            if token in stop:
                break
            new.append(token)
            length += 1
            embeds, mask = self.embed(np.array([[token]])), np.ones((1, length), np.int64)
            at = np.full_like(positions[..., :1], position)
            logits, past = self.step(embeds, mask, at, past)
            position += 1
        return new

    def stepwise(self, prompt: Sample, positions: np.ndarray, split: int) -> np.ndarray:
        """The logits of a prompt, of which the tokens from `split` on go in one by one.

        float32 [S, vocabulary].
        """
        embeds = self._embed_prompt(prompt)
        mask = np.ones((1, embeds.shape[1]), np.int64)
        logits, past = self.step(embeds[:, :split], mask[:, :split], positions[..., :split], None)
        rows = [logits[0]]
        for i in range(split, embeds.shape[1]):
            now = slice(i, i + 1)
            logits, past = self.step(embeds[:, now], mask[:, : i + 1], positions[..., now], past)
            rows.append(logits[0])
        return np.concatenate(rows)


def with_accuracy_level(path: Path, level: int) -> bytes:
    """The graph with another accuracy_level in every MatMulNBits. Its data stay where they are."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            for attribute in node.attribute:
                if attribute.name == "accuracy_level":
                    attribute.i = level
    return model.SerializeToString()
