"""Two ranks compute what one process does, except for the order of sums."""

import os
import socket
import subprocess
import sys

import pytest
import torch

from tools.reference_vlm.model import make_random_checkpoint
from vlmq_export.errors import CalibrationError
from vlmq_export.quantizer.artifact.manifest import OUTER
from vlmq_export.quantizer.artifact.read import Artifact
from vlmq_export.quantizer.calibration.collect import Evidence, summed_on
from vlmq_export.quantizer.calibration.statistics import Statistics
from vlmq_export.quantizer.ranks import ALONE, Ranks, joined

SAME_CODES = 0.999  # share of equal codes
LOSS = 1e-3  # relative difference of the losses
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


def test_alone_changes_nothing():
    sums = Statistics.empty(4, drift=True)
    evidence = Evidence(sums)
    assert summed_on(0, evidence, ALONE) is evidence
    assert ALONE.first
    assert ALONE.owner(5) == 0
    assert ALONE.total(1.5, 2) == [1.5, 2]
    assert ALONE.largest(3) == 3
    assert ALONE.same(7) == 7
    value = torch.arange(3)
    assert ALONE.broadcast(value, 0) is value
    assert ALONE.broadcast_json({"a": 1}, 0) == {"a": 1}
    with joined(torch.device("cpu")) as ranks:
        assert ranks is ALONE


def test_one_process_of_torchrun_is_a_group(monkeypatch):
    """What many ranks do, one does too: on one GPU this is what proves NCCL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    given = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    called = []
    reduce = torch.distributed.all_reduce
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *a: called.append(1) or reduce(*a))
    with joined(torch.device("cpu")) as ranks:
        assert ranks.grouped and ranks.size == 1 and ranks.first
        value = torch.arange(3.0)
        assert torch.equal(ranks.summed(value.clone()), value)
        assert ranks.total(1.5, 2) == [1.5, 2] and ranks.largest(3) == 3
        assert torch.equal(ranks.broadcast(value, 0), value)
        assert ranks.broadcast_json({"a": 1}, 0) == {"a": 1}
        evidence = Evidence(Statistics.empty(4, drift=True))
        assert summed_on(0, evidence, ranks) is evidence
    assert len(called) >= 4


def test_batches_are_shared_out_whole():
    samples = list(range(11))
    parts = [Ranks(r, 3).share(samples) for r in range(3)]
    assert sorted(x for part in parts for x in part) == samples
    assert {len(part) for part in parts} == {3, 4}
    assert Ranks(1, 2).share([]) == []
    with pytest.raises(CalibrationError, match="2 batches of samples for 3 processes"):
        Ranks(0, 3).share([1, 2])


# What each of two processes runs. Rank 1 solves, and the ranks share the 20 tokens unevenly.
WORKER = """
import torch
from vlmq_export.quantizer.calibration.collect import Evidence, summed_on
from vlmq_export.quantizer.calibration.importance import normalized
from vlmq_export.quantizer.calibration.statistics import Statistics
from vlmq_export.quantizer.ranks import joined
torch.set_num_threads(1)
with joined(torch.device("cpu")) as ranks:
    def drawn(seed, shape):
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    x, d, g = drawn(0, (20, 6)), drawn(1, (20, 6)), drawn(2, 20)
    cut = slice(0, 13) if ranks.first else slice(13, 20)
    whole, part = Statistics.empty(6, drift=True), Statistics.empty(6, drift=True)
    whole.add(x, x + d, g.abs())
    part.add(x[cut], (x + d)[cut], g[cut].abs())
    got = summed_on(1, Evidence(part), ranks)
    assert (got is None) == ranks.first
    if got is not None:
        got = got.fitted
        for name in ("hessian", "drift", "diagonal"):
            one, other = getattr(got, name), getattr(whole, name)
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
        assert got.tokens == 20
        assert abs(got.effective_tokens - whole.effective_tokens) < 1e-9
    (own,) = normalized([g[cut].abs()], ranks)
    torch.testing.assert_close(own, normalized([g.abs()])[0][cut])
    zeros = [torch.zeros(3)]
    assert bool((normalized(zeros, ranks)[0] == 1).all())
    for tensor in (torch.randn(3, 4).half(), torch.arange(5, dtype=torch.int32), torch.zeros(0)):
        mine = tensor.clone() if not ranks.first else torch.zeros_like(tensor)
        # The float16 tensor is drawn without a seed, so that of rank 1 is not known here.
        assert torch.equal(ranks.broadcast(mine, 1), tensor) or tensor.dtype == torch.float16
    told = {"a": [1, 2.5, None]}
    assert ranks.broadcast_json(None if ranks.first else told, 1) == told
    assert ranks.same(5 if ranks.first else 9) == 5
    assert ranks.largest(ranks.rank) == 1
"""


def call(*arguments: str) -> None:
    """Run Python with these arguments. It must succeed."""
    command = [sys.executable, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=ONE_THREAD)
    assert done.returncode == 0, done.stderr[-3000:]


def torchrun(*arguments: str) -> None:
    """Run a script or a module in two processes."""
    call("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments)


def test_collectives_of_two_processes(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    torchrun(str(script))


@pytest.mark.parametrize(
    ("name", "more"),
    [("gptq", ()), ("gguf", ("--bits", "4", "--vision-bits", "4"))],
    ids=["decoder", "vision tower too"],
)
def test_two_ranks_choose_the_codes_of_one_process(name, more, tmp_path):
    model = make_random_checkpoint(tmp_path / "model", "qwen2_vl", layers=2, depth=3)
    artifacts = []
    for out, start in (("one", call), ("two", torchrun)):
        options = ["--format", name, "--samples", "9", "--no-verify", "--quiet", *more]
        options += ["--device", "cpu", "--out", str(tmp_path / out)]
        start("-m", "vlmq_export", str(model), *options)
        artifacts.append(Artifact(tmp_path / out / "artifact"))
    one, two = artifacts
    same = total = 0
    for linear in one.linear_names():
        codes = one.linear(linear).solution.codes, two.linear(linear).solution.codes
        same, total = same + int((codes[0] == codes[1]).sum()), total + codes[0].numel()
        a, b = one.records[linear].metrics, two.records[linear].metrics
        if one.records[linear].layer == OUTER:  # the embedding, which no sample calibrates
            assert a == b and torch.equal(*codes)
            continue
        assert a["tokens"] == b["tokens"]
        assert a["effective_tokens"] == pytest.approx(b["effective_tokens"], rel=1e-3)
    losses = [sum(r.metrics.get("loss", 0) for r in x.records.values()) for x in artifacts]
    assert same / total >= SAME_CODES, same / total
    assert losses[1] == pytest.approx(losses[0], rel=LOSS)
    files = [{p.name for p in (tmp_path / n / name).iterdir()} for n in ("one", "two")]
    assert files[0] == files[1]


# What each of two processes runs: once with activations in memory, once in files.
ON_DISK = """
import sys
import torch
from pathlib import Path
from vlmq_export import bundled
from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.quantizer.model.checkpoint import Checkpoint
from vlmq_export.quantizer.ranks import joined
from vlmq_export.quantizer.run.quantize import quantize
from vlmq_export.quantizer.samples.preprocessor import Preprocessor
from vlmq_export.quantizer.samples.rows import read_rows
torch.set_num_threads(1)
model, out = map(Path, sys.argv[1:])
preprocessor = Preprocessor(bundled.REFERENCE_VLM)
samples = [preprocessor.sample(row) for row in read_rows(bundled.CALIBRATION)[:9]]
with joined(torch.device("cpu")) as ranks:
    for place in ("device", "disk"):
        options = {"name": "m", "calibration": {}, "device": "cpu", "ranks": ranks, "place": place}
        config = QuantConfig(group_size=32)
        quantize(Checkpoint(model), samples, config, out / place, **options)
"""


@pytest.mark.slow
def test_two_ranks_keep_their_activations_on_disk(tmp_path):
    """Each process numbers its own files, so that they need a folder each."""
    model = make_random_checkpoint(tmp_path / "model", "qwen2_vl", layers=1, depth=1)
    script = tmp_path / "worker.py"
    script.write_text(ON_DISK)
    torchrun(str(script), str(model), str(tmp_path))
    one, two = (Artifact(tmp_path / place) for place in ("device", "disk"))
    for name in one.linear_names():
        assert torch.equal(one.linear(name).solution.codes, two.linear(name).solution.codes)
    assert not list((tmp_path / "disk").glob(".*"))
