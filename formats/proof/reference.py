"""The fake-quantized reference that every runtime is compared with.

It is transformers' own model, loaded fresh in float32 with the weights that `weights.py` decodes
from the artifact. Logits and greedy answers of held-out prompts come from there.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from inspect import signature
from itertools import count
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from vlmq_export.formats.proof.answers import generate, greedy_answers, stop_ids
from vlmq_export.formats.proof.weights import Weights
from vlmq_export.quantizer.model.architecture import Architecture, pretrained_config
from vlmq_export.quantizer.model.streamed import model_class
from vlmq_export.quantizer.samples.preprocessor import Preprocessor
from vlmq_export.quantizer.samples.rows import Row
from vlmq_export.quantizer.samples.sample import Sample

# Copies of each weight in memory. While the reference is loaded, a weight is held twice: decoded,
# and in the model. It is held once more in the runtime. All three are float32.
_COPIES = 3

# Weights from which on several threads pay. With fewer they wait for each other, and one runtime
# computes in a process beside.
_SMALL = 2**25

_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")

Verdict = Literal["same", "tie", "other"]  # of a greedy answer


def too_large(weights: int, memory: int, copies: int = _COPIES) -> str:
    """Why a model of so many weights is not run whole in `memory` bytes; empty if it is."""
    need = 4 * copies * weights
    if need <= memory:
        return ""
    return f"needs {need / 1e9:.0f} GB for whole models in float32, {memory / 1e9:.0f} GB are there"


def fused(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights by hub name, with those of experts in the two parameters of transformers' layer.

    They are gate_up_proj [experts, 2·inner, hidden] and down_proj [experts, hidden, inner].
    """
    experts: dict[str, dict[tuple[int, str], torch.Tensor]] = {}
    for name in list(state):
        if found := _EXPERT.fullmatch(name):
            module, number, which = found.groups()
            experts.setdefault(module, {})[int(number), which] = state.pop(name)
    for module, parts in experts.items():
        every = range(len(parts) // 3)
        both = [torch.cat([parts.pop((e, "gate")), parts.pop((e, "up"))]) for e in every]
        state[f"{module}.gate_up_proj"] = torch.stack(both)
        state[f"{module}.down_proj"] = torch.stack([parts[e, "down"] for e in every])
    return state


class Reference:
    """The reference model and its held-out prompts. Every result is computed once and kept."""

    def __init__(
        self,
        artifact: Path,
        rows: list[Row],  # held-out; of each the last assistant turn is left out of the prompt
        source: Path | None = None,  # the float checkpoint, if it is there
        memory: int | None = None,  # bytes that whole models may take; None: no limit
        seq_len: int | None = None,  # tokens of a prompt, to which images are scaled down
    ):
        self.artifact = artifact
        self.source = source
        self.memory = memory
        self.seq_len = seq_len
        self.weights = Weights(artifact, source)
        self.folder = artifact / "source"
        self._config = json.loads((self.folder / "config.json").read_text("utf-8"))
        self.architecture = Architecture.of(self._config)
        self.preprocessor = Preprocessor(self.folder)
        # Results are kept by id, and two rows of a file may have the same one.
        twice = {i for i, n in Counter(row.id for row in rows).items() if n > 1}
        self.rows = [
            replace(row, id=f"{row.id} ({n})") if row.id in twice else row
            for n, row in enumerate(rows)
        ]
        self._logits: dict[str, np.ndarray] = {}
        self._answers: dict[str, list[int]] = {}

    @cached_property
    def too_large(self) -> str:
        """Why whole models are not run; empty if they are.

        Weights are compared one at a time, and so in a model of any size.
        """
        return "" if self.memory is None else too_large(self.weights.count, self.memory)

    @cached_property
    def threads(self) -> int:
        """How many threads this model is given, in PyTorch and in every runtime."""
        return 1 if self.weights.count < _SMALL else os.cpu_count() or 1

    @property
    def fits_beside(self) -> bool:
        """Whether one runtime more, in a process beside, finds room for its model."""
        return self.memory is None or not too_large(self.weights.count, self.memory, _COPIES + 1)

    @cached_property
    def prompts(self) -> list[Sample]:
        """One sample per row: image, question and generation prompt, without the answer."""
        sample = partial(self.preprocessor.sample, prompt_only=True, seq_len=self.seq_len)
        return [sample(row) for row in self.rows]

    @cached_property
    def vocabulary(self) -> int:
        """The number of real vocabulary rows. The embedding may be padded beyond them."""
        return min(int(self.architecture.text["vocab_size"]), len(self.preprocessor.tokenizer))

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """The tokens that end an answer."""
        return stop_ids(self.folder, self.preprocessor.tokenizer)

    @cached_property
    def model(self) -> Any:  # a PreTrainedModel, whose parts torch types as Tensor | Module
        """transformers' own class in float32, with the decoded weights.

        transformers converts the names as for any checkpoint of the hub. Raises CheckpointError if
        it cannot read config.json, and RuntimeError for a tensor that found no place.
        """
        config = pretrained_config(self._config)
        cls: Any = model_class(config)
        state = fused({name: torch.from_numpy(array) for name, array in self.weights.items()})
        model, info = cls.from_pretrained(
            None, config=config, state_dict=state, dtype=torch.float32, output_loading_info=True
        )
        wrong = [*info["missing_keys"], *info["unexpected_keys"]]
        if wrong:
            raise RuntimeError(
                f"transformers could not place {len(wrong)} tensors of the artifact,"
                f" first {wrong[0]}"
            )
        return model.eval()

    @cached_property
    def _empty(self) -> Any:  # a PreTrainedModel
        """transformers' own class without weights. It knows where a prompt's tokens stand."""
        config = pretrained_config(self._config)
        cls: Any = model_class(config)
        with torch.device("meta"):
            return cls(config)

    @torch.no_grad()
    def logits(self, prompt: Sample) -> np.ndarray:
        """float32 [tokens, vocabulary], of every position of the prompt."""
        if prompt.id not in self._logits:
            out = self.model(**prompt.model_inputs(), use_cache=False).logits
            self._logits[prompt.id] = out[0, :, : self.vocabulary].numpy()
        return self._logits[prompt.id]

    @torch.no_grad()
    def vision_features(self, prompt: Sample) -> np.ndarray:
        """float32 [image tokens, hidden] of all images in order."""
        features = self.model.model.get_image_features(**prompt.image_inputs()).pooler_output
        return np.concatenate([f.reshape(-1, f.shape[-1]).numpy() for f in features])

    @torch.no_grad()
    def added_features(self, prompt: Sample) -> list[np.ndarray]:
        """DeepStack's features, float32 [image tokens, hidden] each; empty in other families.

        They are added to the image tokens after decoder layers 0, 1, and so on.
        """
        out = self.model.model.get_image_features(**prompt.image_inputs())
        return [torch.cat(list(f)).numpy() for f in getattr(out, "deepstack_features", None) or []]

    def position_ids(self, prompt: Sample) -> np.ndarray:
        """The positions of the tokens, int64.

        [3, 1, tokens] in a family with M-RoPE: temporal, height and width. [1, tokens] in others.
        """
        if not prompt.mrope:
            return np.arange(len(prompt.input_ids))[None]
        find = self._empty.model.get_rope_index
        # The first transformers 5 look for the image tokens themselves, and are not told them.
        known = signature(find).parameters
        inputs = {k: v for k, v in prompt.model_inputs().items() if k in known}
        ids, _ = find(**inputs)
        return ids.numpy()

    def answer(self, prompt: Sample) -> list[int]:
        """Greedy token ids, at most ANSWER, up to and without the stop token."""
        self.answer_all([prompt])
        return self._answers[prompt.id]

    def answer_all(
        self, prompts: Sequence[Sample], tell: Callable[[int], None] = lambda _: None
    ) -> None:
        """Answer the prompts whose answers are not known yet, those of one shape together.

        tell: is given the number of prompts that are done, and may raise to stop.
        """
        waiting = [prompt for prompt in prompts if prompt.id not in self._answers]
        known = len(prompts) - len(waiting)
        if not waiting:
            return  # the model need not be loaded
        inputs = [prompt.model_inputs() for prompt in waiting]
        answers = greedy_answers(self.model, inputs, self.stop_ids)
        for done, (place, answer) in enumerate(answers, known):
            self._answers[waiting[place].id] = answer
            tell(done)

    def judge(self, prompt: Sample, answer: list[int], gate: float) -> Verdict:
        """How a runtime's greedy answer compares with the reference's.

        gate: the relative error that the runtime's logits are allowed.

        The verdict is `tie` if, at the first token that differs, the logits of the two tokens are
        at most √2 · gate · ‖logits‖ apart. An error of gate · ‖logits‖ can exchange two such
        tokens, and no others. What follows there is another text, and is not compared.
        """
        own = self.answer(prompt)
        if answer == own:
            return "same"
        at = next(i for i in count() if own[i : i + 1] != answer[i : i + 1])
        told = {"output_logits": True, "return_dict_in_generate": True}
        out = generate(self.model, prompt.model_inputs(), self.stop_ids, at + 1, **told)
        logits = out.logits[at][0].double()
        # An answer that is over at this place went on with a stop token.
        stop = sorted(self.stop_ids)
        ours, theirs = (logits[each[at : at + 1] or stop].max() for each in (own, answer))
        return "tie" if bool(ours - theirs <= 2**0.5 * gate * logits.norm()) else "other"

    @contextmanager
    def changed(self) -> Iterator[None]:
        """Puts the results that were kept aside, because the model is about to be changed."""
        kept = self._logits, self._answers
        self._logits, self._answers = {}, {}
        try:
            yield
        finally:
            self._logits, self._answers = kept

    @contextmanager
    def language_norm_eps(self, eps: float) -> Iterator[Reference]:
        """The reference with another RMS epsilon in the language model's norms.

        llama.cpp's qwen2vl computes with one of its own.
        """
        decoder = self.model.get_decoder()
        names = ("variance_epsilon", "eps")
        norms = [(m, n) for m in decoder.modules() for n in names if hasattr(m, n)]
        before = [getattr(m, name) for m, name in norms]
        with self.changed():
            try:
                for m, name in norms:
                    setattr(m, name, eps)
                yield self
            finally:
                for (m, name), value in zip(norms, before):
                    setattr(m, name, value)
