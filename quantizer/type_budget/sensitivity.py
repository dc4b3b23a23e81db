"""What each block type or width of each matrix would cost: the KL divergence of the answers.

To second order, a change ΔW of one matrix moves the distribution of the answers by

    KL ≈ ½ E ⟨∂ (vᵀz) / ∂W, ΔW⟩²

    z   the logits
    v   random, with the covariance E vvᵀ = diag(p) − ppᵀ of a token that is drawn from p

This is the Fisher information along ΔW (Gauss-Newton: the Hessian of KL where ΔW = 0). The vector
v = √p∘ε − p·(√pᵀε), with ε = ±1, has that covariance. (The one-hot vector of a token drawn from p,
minus p, has it too. But where the model is sure of a token, it is almost always near zero.) So one
backward pass for each sample, and one inner product for each matrix and type, measure the cost at
the end of the network with the whole covariance of inputs and gradients, which is never formed.

ΔW is the solver's error (errors.py), from statistics of one half of the samples. Its cost is
measured on the other half. That of a lattice follows from that of a K type (likeness.py). A vision
tower counts as one matrix, whose error is what it changes for the decoder (tower.py). The costs of
the matrices are taken to add up; `knapsack.choose` then chooses. docs/gguf.md says how well this
works for block types, docs/widths.md for widths.

Only one layer has its weights in memory. All samples are taken forward first, and what enters each
layer is put away. Then the layers are filled once more, from the last to the first: each is solved,
and the gradients are passed back through it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from vlmq_export.errors import CalibrationError
from vlmq_export.quantizer.calibration.answer_loss import AT_ONCE, layer_inputs, layer_output
from vlmq_export.quantizer.calibration.batches import Batch, add, decoder_inputs
from vlmq_export.quantizer.calibration.hooks import before
from vlmq_export.quantizer.calibration.offload import Shelf
from vlmq_export.quantizer.calibration.statistics import Statistics
from vlmq_export.quantizer.config import TOWER
from vlmq_export.quantizer.job import Job
from vlmq_export.quantizer.model.streamed import StreamedModel
from vlmq_export.quantizer.samples.sample import Lengths, Sample
from vlmq_export.quantizer.type_budget import likeness
from vlmq_export.quantizer.type_budget.errors import errors_of, ratios_of
from vlmq_export.quantizer.type_budget.likeness import Kind
from vlmq_export.quantizer.type_budget.tower import Shift, shifts_of

SAMPLES = 128  # of each half; the relative error of a cost is about √(2 / samples)
_SLAB = 2**14  # rows of the output matrix that are solved at once
Kinds = Mapping[str, Iterable[Kind]]  # hub module → types or widths to try
Putaway = list[list[Callable[[], torch.Tensor]]]  # of each batch, what enters each layer


def kept_bytes(places: int, hidden: int, lengths: Lengths) -> int:
    """Bytes of what is kept of the samples that costs are measured on.

    places: where a token has a vector that is kept: at the input of each layer, and at each place
    where a tower of another width changes the decoder's inputs.
    """
    share = min(1.0, 2 * SAMPLES / max(1, lengths.samples))
    return 4 * places * hidden * round(share * lengths.tokens)


def measured(
    model: StreamedModel,
    job: Job,
    kinds: Kinds,
    samples: Sequence[Sample],
    shelf: Shelf | None = None,  # where activations rest
    progress: Callable[[int, int], None] = lambda *_: None,
) -> dict[str, dict[Kind, float]]:
    """matrix → kind → KL per answer token, in nats, that this one matrix at that kind would cost.

    Linears are solved, and the embedding is rounded to nearest. A matrix that is embedding and
    output matrix stands once, as the embedding. The vision tower stands under TOWER, by its bits.

    Raises CalibrationError where no sample has a finite gradient.
    """
    usable = [s for s in samples if bool(_predicted(s).any())][: 2 * SAMPLES]
    # One sample must do for both halves.
    run = _Run.of(model, job, kinds, usable[::2], usable[1::2] or usable, shelf)
    gradients: list[Callable[[], torch.Tensor]] = []
    for index in reversed(range(job.layers)):
        progress(job.layers - 1 - index, job.layers)
        with model.filled_layer(index) as layer:
            entering = [seen.pop() for seen in run.inputs]
            if index == job.layers - 1:
                gradients = _from_the_head(run, layer, entering)
            _tower_slopes(run, index + 1, gradients)
            errors = _layer_errors(run, layer, index, entering)
            gradients = _back(run, layer, index, entering, errors, gradients)
    _tower_slopes(run, 0, gradients)
    _embedding_slopes(run, gradients)
    return likeness.completed(run.costs(), kinds, run.ratios, solved=run.solved)


@dataclass
class _Run:
    """The samples on their way back, and what was found so far."""

    model: StreamedModel
    job: Job
    kinds: Kinds
    solved: list[str]  # matrices whose inputs calibrate them: linears, and an output matrix
    probes: list[str]  # those of them that lattices are solved on
    held: Sequence[Sample]
    batches: list[Batch]  # of the samples that statistics are taken of
    singles: list[Batch]  # each of the other samples alone
    inputs: Putaway  # of all these batches
    slopes: dict[str, dict[Kind, torch.Tensor]]  # ⟨∂, ΔW⟩ of each of the other samples
    shifts: dict[int, list[Shift]]  # width of the tower → what it changes for each of them
    ratios: list[likeness.Ratios] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        model: StreamedModel,
        job: Job,
        kinds: Kinds,
        fitted: Sequence[Sample],
        held: Sequence[Sample],
        shelf: Shelf | None,
    ) -> _Run:
        """Take all samples forward."""
        embedding = job.family.embedding
        solved = [name for name in kinds if name not in (embedding, TOWER)]
        ids = torch.cat([sample.input_ids for sample in (*fitted, *held)])
        with model.filled_prefix(ids) as prefix:
            given: Any = {
                "two_streams": False,
                "device": model.device,
                "added": job.family.added,
                "shelf": shelf,
            }
            batches = decoder_inputs(prefix, fitted, **given) if solved else []
            singles = [decoder_inputs(prefix, [sample], **given)[0] for sample in held]
        inputs = layer_inputs(model, job.layers, [*batches, *singles])
        slopes = {
            name: {k: torch.zeros(len(held), dtype=torch.float64) for k in likeness.quick(each)}
            for name, each in kinds.items()
        }
        widths = [int(bits) for bits in kinds.get(TOWER, ())]
        rest = shelf or Shelf(model.device)
        shifts = shifts_of(model, job, widths, fitted, held, singles, rest)
        probes = likeness.probes(kinds, solved)
        return cls(
            model, job, kinds, solved, probes, held, batches, singles, inputs, slopes, shifts
        )

    def add(self, name: str, kind: Kind, sample: int, slope: torch.Tensor) -> None:
        """A part of ⟨∂, ΔW⟩ of one sample."""
        self.slopes[name][kind][sample] += float(slope)

    def errors(
        self, name: str, weight: torch.Tensor, known: Statistics | None
    ) -> dict[Kind, torch.Tensor]:
        """kind → ΔW of a matrix, or of some of its rows."""
        return errors_of(weight, likeness.quick(self.kinds[name]), known, self.job.config)

    def probe(self, name: str, weight: torch.Tensor, known: Statistics) -> None:
        """Solve a matrix on the lattices, too, if it is one of the probes."""
        if name in self.probes:
            self.ratios.append(ratios_of(weight, self.kinds[name], known, self.job.config))

    def costs(self) -> dict[str, dict[Kind, float]]:
        """The mean over the tokens of all samples whose gradients are finite everywhere."""
        every = [slope for each in self.slopes.values() for slope in each.values()]
        finite = torch.stack(every).isfinite().all(0)
        tokens = sum(int(_predicted(s).sum()) for s, ok in zip(self.held, finite) if ok)
        if not tokens:
            raise CalibrationError(
                "--target-bpw: no sample has finite gradients; the model or the images are damaged"
            )
        return {
            name: {k: float(s[finite].square().sum()) / 2 / tokens for k, s in each.items()}
            for name, each in self.slopes.items()
        }


def _layer_errors(
    run: _Run, layer: nn.Module, index: int, entering: Sequence[Callable[[], torch.Tensor]]
) -> dict[str, dict[Kind, torch.Tensor]]:
    """Name in the layer → kind → ΔW, of the layer's linears that are asked for.

    The statistics are of the full-precision model, and all tokens count alike.
    """
    prefix = run.job.prefix(index)
    groups = [[n for n in g if prefix + n in run.kinds] for g in run.job.groups(index)]
    sums: dict[str, Statistics] = {}
    with ExitStack() as hooks, torch.no_grad():
        for first in (group[0] for group in groups if group):
            module: Any = layer.get_submodule(first)
            sums[first] = Statistics.empty(
                module.weight.shape[1], drift=False, device=run.model.device
            )
            hooks.enter_context(before(module, _adds_to(sums[first])))
        for batch, hidden in zip(run.batches, entering) if sums else ():
            if bool(batch.valid.all()):
                layer_output(layer, hidden(), batch, index)
    found: dict[str, dict[Kind, torch.Tensor]] = {}
    for group in filter(None, groups):
        known = sums.pop(group[0]).to_float32()
        for name in group:
            weight: Any = layer.get_submodule(name).weight
            run.probe(prefix + name, weight, known)
            found[name] = run.errors(prefix + name, weight, known)
    return found


def _adds_to(sums: Statistics) -> Callable[[tuple, dict], None]:
    """What adds a linear's input [samples, tokens, in] to its sums."""
    return lambda args, _kwargs: sums.add(args[0].flatten(0, -2))


def _back(
    run: _Run,
    layer: nn.Module,
    index: int,
    entering: Sequence[Callable[[], torch.Tensor]],
    errors: Mapping[str, Mapping[Kind, torch.Tensor]],
    gradients: Sequence[Callable[[], torch.Tensor]],  # at what leaves the layer, of each sample
) -> list[Callable[[], torch.Tensor]]:
    """The gradients at what enters the layer. The slopes of its linears are added."""
    weights: list[Any] = [layer.get_submodule(name).weight for name in errors]
    prefix, onward = run.job.prefix(index), []
    for weight in weights:
        weight.requires_grad_(True)
    for place, (batch, gradient) in enumerate(zip(run.singles, gradients)):
        hidden = entering[len(run.batches) + place]().requires_grad_()
        with torch.enable_grad():
            out = layer_output(layer, hidden, batch, index)
            first, *own = torch.autograd.grad(out, [hidden, *weights], grad_outputs=gradient())
        onward.append(batch.aside(first))
        for (name, kinds), slope in zip(errors.items(), own):
            for kind, error in kinds.items():
                moved = torch.dot(slope.flatten(), error.float().flatten())
                run.add(prefix + name, kind, place, moved)
    return onward


def _from_the_head(
    run: _Run, layer: nn.Module, entering: Sequence[Callable[[], torch.Tensor]]
) -> list[Callable[[], torch.Tensor]]:
    """The gradients at what leaves the last layer. Slopes of the output matrix are added."""
    last, states, gradients = run.job.layers - 1, [], []
    with run.model.filled_head() as head, torch.no_grad():
        outs = zip(run.singles, entering[len(run.batches) :], run.held)
        for place, (batch, hidden, sample) in enumerate(outs):
            out = add(layer_output(layer, hidden(), batch, last), batch, last)
            where = _predicted(sample).nonzero().squeeze(1).to(out.device)
            states.append(out[0, where])
            gradient = torch.zeros_like(out)
            for some, v in _directions(head, states[-1], _seed(run, place)):
                with torch.enable_grad():
                    leaf = some.detach().requires_grad_()
                    (found,) = torch.autograd.grad((v * head(leaf)).sum(), leaf)
                taken, where = where[: len(some)], where[len(some) :]
                gradient[0, taken] = found
            gradients.append(batch.aside(gradient))
    tied = run.job.architecture.tied
    name = run.job.family.embedding if tied else run.job.family.head
    if name in run.kinds:
        known = None if tied else _head_sums(run, layer, entering)
        _head_slopes(run, name, states, known)
    return gradients


def _head_sums(
    run: _Run, layer: nn.Module, entering: Sequence[Callable[[], torch.Tensor]]
) -> Statistics:
    """The sums of the output matrix's inputs."""
    last = run.job.layers - 1
    sums = Statistics.empty(run.model.head_shape[1], drift=False, device=run.model.device)
    with run.model.filled_norm() as norm, torch.no_grad():
        for batch, hidden in zip(run.batches, entering):
            if bool(batch.valid.all()):
                out = add(layer_output(layer, hidden(), batch, last), batch, last)
                sums.add(norm(out).flatten(0, -2))
    return sums.to_float32()


@torch.no_grad()
def _head_slopes(
    run: _Run,
    name: str,
    states: Sequence[torch.Tensor],  # of each sample, [answer tokens, hidden] before the norm
    known: Statistics | None,
) -> None:
    """Add the slopes of the output matrix, some of its rows at a time."""
    model, (rows, _) = run.model, run.model.head_shape
    if known is not None:
        run.probe(name, model.head_rows(0, _SLAB), known)
    with model.filled_head() as head, model.filled_norm() as norm:
        for start in range(0, rows, _SLAB):
            slab = slice(start, start + _SLAB)
            errors = run.errors(name, model.head_rows(start, start + _SLAB), known)
            for place, state in enumerate(states):
                for some, v in _directions(head, state, _seed(run, place)):
                    entered = norm(some)
                    for kind, error in errors.items():
                        run.add(name, kind, place, (entered @ error.float().T * v[:, slab]).sum())


@torch.no_grad()
def _tower_slopes(run: _Run, place: int, gradients: Sequence[Callable[[], torch.Tensor]]) -> None:
    """Add what the image tokens say of each width of the vision tower.

    place: 0 at what enters the first layer, then one more behind each layer that something is added
    after.
    gradients: there, of each sample.
    """
    for bits, shifts in run.shifts.items():
        for number, (batch, shift) in enumerate(zip(run.singles, shifts)):
            if place < len(shift):
                moved = gradients[number]()[batch.image] * shift[place]()
                run.add(TOWER, bits, number, moved.sum())


@torch.no_grad()
def _embedding_slopes(run: _Run, gradients: Sequence[Callable[[], torch.Tensor]]) -> None:
    """Add what the embedding's rows say where they are looked up: at the tokens of text.

    gradients: at what enters the first layer, of each sample.
    """
    name = run.job.family.embedding
    if name not in run.kinds:
        return
    every = torch.cat([sample.input_ids for sample in run.held]).unique()
    rows = run.model.checkpoint.tensor(f"{name}.weight", rows=every.tolist())
    weight = rows.to(run.model.device).float()
    errors = run.errors(name, weight, None)
    scale = getattr(run.model.model.get_input_embeddings(), "embed_scale", 1.0)  # Gemma's √hidden
    for place, (sample, gradient) in enumerate(zip(run.held, gradients)):
        text = ~sample.vision
        where = torch.searchsorted(every, sample.input_ids[text]).to(weight.device)
        own = gradient()[0, text.to(weight.device)] * scale
        for kind, error in errors.items():
            run.add(name, kind, place, (error[where].float() * own).sum())


def _directions(
    head: Callable[[torch.Tensor], torch.Tensor],  # [n, hidden] → logits [n, vocabulary]
    states: torch.Tensor,  # [answer tokens, hidden]
    seed: int,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(some of the states, v [n, vocabulary]), the same for the same seed."""
    draws = torch.Generator().manual_seed(seed)
    for some in states.split(AT_ONCE):
        p = head(some).softmax(-1)
        signs = torch.randint(2, p.shape, generator=draws).to(p.device) * 2 - 1
        scattered = p.sqrt() * signs
        yield some, scattered - p * scattered.sum(-1, keepdim=True)


def _seed(run: _Run, sample: int) -> int:
    return run.job.config.seed * 2**20 + sample


def _predicted(sample: Sample) -> torch.Tensor:
    """bool [S − 1]: the positions whose next token is part of the answer.

    Of a sample without an answer, those whose next token is text.
    """
    return sample.answer[1:] if bool(sample.answer[1:].any()) else ~sample.vision[1:]
