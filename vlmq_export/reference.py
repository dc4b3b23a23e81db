"""The fake-quantized reference that every runtime is held against.

The model is loaded fresh in float32 by transformers; the artifact's integers are decoded here, from the safetensors
files, by code that shares nothing with the writers in `formats/` nor with `quantizer/`'s own decoder.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors import safe_open

from vlmq_export.quantizer.calibration import Preprocessor, Row, Sample
from vlmq_export.quantizer.families import family_of
from vlmq_export.quantizer.rotation import changes

_AFFINE = ("codes", "scales", "zero_points", "g_idx")
_BLOCKS = ("codes", "d", "sub_scales", "dmin", "sub_mins")
# Code of zero in the types without a minimum.
_CENTRES = {"Q3_K": 4, "Q4_0": 8, "Q5_0": 16, "Q6_K": 32, "Q8_0": 128, "TQ2_0": 1, "Q2_0": 1}
# A weight, while the reference is loaded (decoded, and in the model) and once more in the runtime beside it.
_WHOLE_MODEL_BYTES = 3 * 4


class Weights:
    """Hub tensor name → what the shipped model must decode to, read from an artifact folder (or a source for floats)."""

    def __init__(self, artifact: Path, source: Path | None = None):
        self._files: dict[str, Path] = {}
        self._stored: dict[str, str] = {}  # names in files of the source, which may be those of another version
        family = family_of(json.loads((artifact / "source" / "config.json").read_text("utf-8")))
        for file in [*sorted(artifact.glob("float-*.safetensors")), *sorted(artifact.glob("layer-*.safetensors"))]:
            with safe_open(file, framework="pt") as f:
                self._files |= dict.fromkeys(f.keys(), file)
        manifest = json.loads((artifact / "manifest.json").read_text("utf-8"))
        self._types = {m["name"]: m.get("type", "") for m in manifest["modules"]}
        self.linears = [k.removesuffix(".codes") for k in self._files if k.endswith(".codes")]
        packed = {f"{n}.{part}" for n in self.linears for part in (*_AFFINE, *_BLOCKS, "energy")}
        self.parts = packed & set(self._files)
        self.floats = [k for k in self._files if k not in packed]
        changed = {k for k in self.floats if self._files[k].name.startswith("float-changed-")}
        rotate = manifest["config"].get("rotate", "off") != "off"

        def moved(name: str) -> bool:
            """Whether the artifact has another value of a float tensor than the source."""
            return rotate and changes(name, family)

        if source is not None:  # floats from the source itself, not from the artifact's copies
            for file in sorted(source.glob("*.safetensors")):
                with safe_open(file, framework="pt") as f:
                    rounded = {f"{n}.bias" for n in self.linears}
                    stored = {family.hub_name(k): k for k in f.keys()}  # noqa: SIM118
                    mine = {
                        k: stored[k] for k in stored if k in self.floats and k not in rounded | changed and not moved(k)
                    }
                    self._files |= dict.fromkeys(mine, file)
                    self._stored |= mine

    def names(self) -> list[str]:
        """Every parameter of the model once, by hub name."""
        return [*self.floats, *(f"{n}.weight" for n in self.linears)]

    def tensor(self, key: str) -> torch.Tensor:
        with safe_open(self._files[key], framework="pt") as f:
            return f.get_tensor(self._stored.get(key, key))

    def array(self, name: str) -> np.ndarray:
        """float32, decoded if quantized: scale · (code − zero_point), one rounding."""
        module = name.removesuffix(".weight")
        if f"{module}.codes" not in self._files:
            return self.tensor(name).to(torch.float32).numpy()
        if f"{module}.d" in self._files:
            return self._from_blocks(module)
        part = {k: self.tensor(f"{module}.{k}").numpy() for k in _AFFINE}
        steps = part["codes"].astype(np.int16) - part["zero_points"].astype(np.int16)[:, part["g_idx"]]
        return steps.astype(np.float32) * part["scales"].astype(np.float32)[:, part["g_idx"]]

    def _from_blocks(self, module: str) -> np.ndarray:
        """(d · sub_scale) · (code − centre) − dmin · sub_min: products exact, one rounding."""
        part = {k: self.tensor(f"{module}.{k}").numpy() for k in _BLOCKS if f"{module}.{k}" in self._files}
        codes = part["codes"]
        subs = part["sub_scales"].shape[1]
        each, per_block = codes.shape[1] // subs, subs // part["d"].shape[1]

        def spread(unit: str, multiple: str) -> np.ndarray:
            exact = np.repeat(part[unit].astype(np.float32), per_block, 1) * part[multiple].astype(np.float32)
            return np.repeat(exact, each, 1)

        if "dmin" in part:
            return spread("d", "sub_scales") * codes.astype(np.float32) - spread("dmin", "sub_mins")
        centre = _CENTRES[self._types[module]]
        return spread("d", "sub_scales") * (codes.astype(np.int16) - centre).astype(np.float32)

    def items(self) -> Iterator[tuple[str, np.ndarray]]:
        return ((name, self.array(name)) for name in self.names())

    @cached_property
    def count(self) -> int:
        """Number of weights of the model."""
        total = 0
        for name in self.names():
            key = name if name in self._files else f"{name.removesuffix('.weight')}.codes"
            with safe_open(self._files[key], framework="pt") as f:
                total += int(np.prod(f.get_slice(self._stored.get(key, key)).get_shape()))
        return total


Verdict = Literal["same", "tie", "other"]  # of a greedy answer


class Reference:
    """The reference model with its held-out prompts. Everything is computed once and kept."""

    def __init__(self, artifact: Path, rows: list[Row], source: Path | None = None, memory: int | None = None):
        """`rows`: held-out conversations with images; the last assistant turn is the expected answer. `memory`: bytes that
        whole models may take, None for any number."""
        self.artifact = artifact
        self.source = source
        self.memory = memory
        self.weights = Weights(artifact, source)
        self.folder = artifact / "source"
        self.config: dict = json.loads((self.folder / "config.json").read_text("utf-8"))
        self.preprocessor = Preprocessor(self.folder)
        # Results are kept by id, and calibration files repeat theirs.
        twice = {i for i, n in Counter(row.id for row in rows).items() if n > 1}
        self.rows = [replace(row, id=f"{row.id} ({n})") if row.id in twice else row for n, row in enumerate(rows)]
        self._logits: dict[str, np.ndarray] = {}
        self._answers: dict[str, list[int]] = {}

    @cached_property
    def too_large(self) -> str:
        """Why whole models are not run, or nothing. Weights are compared one at a time whatever their number."""
        need = _WHOLE_MODEL_BYTES * self.weights.count
        if self.memory is None or need <= self.memory:
            return ""
        return f"needs {need / 1e9:.0f} GB for whole models in float32, {self.memory / 1e9:.0f} GB are there"

    @cached_property
    def prompts(self) -> list[Sample]:
        """One sample a row: image, question and generation prompt, without the answer."""
        return [self.preprocessor.sample(row, prompt_only=True) for row in self.rows]

    @cached_property
    def vocabulary(self) -> int:
        """Number of real vocabulary rows; the embedding may be padded beyond them."""
        text = self.config.get("text_config") or self.config
        return min(int(text["vocab_size"]), len(self.preprocessor.tokenizer))

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        file = self.folder / "generation_config.json"
        eos = json.loads(file.read_text("utf-8")).get("eos_token_id") if file.is_file() else None
        eos = self.preprocessor.tokenizer.eos_token_id if eos is None else eos
        return frozenset(eos if isinstance(eos, list) else [eos])

    @cached_property
    def model(self) -> torch.nn.Module:
        """transformers' own class in float32 with the decoded weights; name conversion is transformers' own too."""
        import transformers

        config = transformers.AutoConfig.from_pretrained(self.folder)
        cls = getattr(transformers, config.architectures[0])
        state = {name: torch.from_numpy(array) for name, array in self.weights.items()}
        model, info = cls.from_pretrained(
            None, config=config, state_dict=state, dtype=torch.float32, output_loading_info=True
        )
        wrong = [*info["missing_keys"], *info["unexpected_keys"]]
        if wrong:
            raise RuntimeError(f"transformers could not place {len(wrong)} tensors of the artifact, first {wrong[0]}")
        return model.eval()

    @torch.no_grad()
    def logits(self, prompt: Sample) -> np.ndarray:
        """float32 [S, vocabulary], every position of the prompt."""
        if prompt.id not in self._logits:
            out = self.model(**prompt.model_inputs(), use_cache=False).logits[0, :, : self.vocabulary]
            self._logits[prompt.id] = out.numpy()
        return self._logits[prompt.id]

    @torch.no_grad()
    def vision_features(self, prompt: Sample) -> np.ndarray:
        """float32 [image tokens, hidden] of all images in order."""
        features = self.model.model.get_image_features(**prompt.image_inputs()).pooler_output
        return np.concatenate([f.reshape(-1, f.shape[-1]).numpy() for f in features])

    @torch.no_grad()
    def added_features(self, prompt: Sample) -> list[np.ndarray]:
        """What is added to the image tokens after decoder layers 0, 1, …: float32 [image tokens, hidden] each."""
        out = self.model.model.get_image_features(**prompt.image_inputs())
        return [torch.cat(list(f)).numpy() for f in getattr(out, "deepstack_features", None) or []]

    def position_ids(self, prompt: Sample) -> np.ndarray:
        """int64 [3, 1, S]: temporal, height and width positions of M-RoPE; [1, S] where positions have one axis."""
        inputs = prompt.model_inputs()
        if not prompt.mrope:
            return np.arange(len(prompt.input_ids))[None]
        ids, _ = self.model.model.get_rope_index(
            inputs["input_ids"], mm_token_type_ids=inputs["mm_token_type_ids"],
            image_grid_thw=inputs.get("image_grid_thw"), attention_mask=inputs["attention_mask"],
        )  # fmt: skip
        return ids.numpy()

    @torch.no_grad()
    def answer(self, prompt: Sample, limit: int = 16) -> list[int]:
        """Greedy token ids up to and without the stop token."""
        if prompt.id not in self._answers:
            inputs = prompt.model_inputs()
            ids = self.model.generate(
                **inputs, max_new_tokens=limit, do_sample=False, num_beams=1, eos_token_id=sorted(self.stop_ids),
                pad_token_id=min(self.stop_ids),
            )  # fmt: skip
            new = ids[0, inputs["input_ids"].shape[1] :].tolist()
            self._answers[prompt.id] = new[: next((i for i, t in enumerate(new) if t in self.stop_ids), len(new))]
        return self._answers[prompt.id]

    @torch.no_grad()
    def judge(self, prompt: Sample, answer: list[int], gate: float, limit: int = 16) -> Verdict:
        """How a runtime's greedy answer compares: `tie` where it left ours at two tokens that its rounding may exchange.

        Logits off by `gate` of their norm, which is what their own gate allows, exchange two tokens whose logits here are
        at most √2 · gate · norm apart, and no others. What follows such a place is another text, and says nothing.
        """
        own = self.answer(prompt, limit)
        if answer == own:
            return "same"
        at = next(i for i in count() if own[i : i + 1] != answer[i : i + 1])
        logits = self.model.generate(
            **prompt.model_inputs(), max_new_tokens=at + 1, do_sample=False, num_beams=1,
            eos_token_id=sorted(self.stop_ids), pad_token_id=min(self.stop_ids), output_logits=True,
            return_dict_in_generate=True,
        ).logits[at][0].double()  # fmt: skip
        stop = sorted(self.stop_ids)
        ours, theirs = (logits[each[at : at + 1] or stop].max() for each in (own, answer))  # an answer ends with a stop
        return "tie" if bool(ours - theirs <= 2**0.5 * gate * logits.norm()) else "other"

    @contextmanager
    def language_norm_eps(self, eps: float):
        """The reference with another RMS epsilon in the language model's norms: what llama.cpp's qwen2vl computes."""
        norms = [m for m in self.model.model.language_model.modules() if hasattr(m, "variance_epsilon")]
        before = [m.variance_epsilon for m in norms]
        kept, self._logits, answers, self._answers = self._logits, {}, self._answers, {}
        try:
            for m in norms:
                m.variance_epsilon = eps
            yield self
        finally:
            for m, value in zip(norms, before):
                m.variance_epsilon = value
            self._logits, self._answers = kept, answers
