"""Quantize a model folder with GPTQModel on exactly the samples that our own quantizer would see.

    python tools/bench/peers/run_gptqmodel.py REQUEST.json

The keys of the request are model, out, rows, samples, bits, group_size, sym, desc_act,
act_group_aware and gptaq.

GPTQModel runs in a process of its own, because importing it patches transformers and safetensors.
Its processor needs torchvision, so that our tokenized samples take the place of its dataset
preparation. Everything after that is its own. It knows SmolVLM2 by name, but not SmolVLM, whose
decoder lies at the same place: SmolVLM gets the same definition.
"""

import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HOME", "/tmp/vlmq-gptqmodel-home")
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # it refuses to load on two cores otherwise
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from vlmq_export.quantizer.samples.preprocessor import Preprocessor
from vlmq_export.quantizer.samples.rows import read_rows


def main(request: dict) -> None:
    """Quantize as the request says, and write the model into its folder `out`."""
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig
    from gptqmodel.models.auto import MODEL_MAP, SUPPORTED_MODELS
    from gptqmodel.models.definitions.base_qwen2_vl import BaseQwen2VLGPTQ
    from gptqmodel.models.definitions.qwen2_5_vl import Qwen2_5_VLQModel
    from gptqmodel.models.definitions.smolvlm import SmolVLMQModel
    from gptqmodel.quantization.config import GPTAQConfig

    torch.manual_seed(0)
    preprocessor = Preprocessor(Path(request["model"]))
    rows = read_rows(Path(request["rows"]))[request.get("first", 0) :][: request["samples"]]
    samples = [preprocessor.sample(row).model_inputs() for row in rows]
    SmolVLMQModel.require_pkgs = None
    MODEL_MAP["idefics3"] = SmolVLMQModel
    SUPPORTED_MODELS.append("idefics3")
    for cls in (BaseQwen2VLGPTQ, Qwen2_5_VLQModel, SmolVLMQModel):
        cls.require_load_processor = False
        cls.prepare_dataset = lambda self, calibration_dataset, *_, **__: calibration_dataset
    order = "desc_act" if request["desc_act"] else "act_group_aware"
    config = QuantizeConfig(
        bits=request["bits"],
        group_size=request["group_size"],
        sym=request["sym"],
        damp_percent=0.01,
        device="cpu",
        gptaq=GPTAQConfig(alpha=0.25) if request["gptaq"] else None,
        offload_to_disk=False,
        **{order: request[order]},
    )
    model = GPTQModel.load(request["model"], config, dtype=torch.float32)
    start = time.perf_counter()
    model.quantize(samples, batch_size=1, calibration_data_min_length=1)
    seconds = time.perf_counter() - start
    model.save(request["out"])
    (Path(request["out"]) / "seconds.json").write_text(json.dumps({"seconds": seconds}))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
