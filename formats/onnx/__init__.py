"""ONNX: three graphs for ONNX Runtime, quantized linears as com.microsoft::MatMulNBits.

    plan.py            what would be written, and what is refused
    graphs/            float graphs without weights, from mobius or traced by torch
    passes/            operators fused, integers filled in, linears merged
    write.py           the three graphs with their data, and the files that belong beside them
    genai_config.py    the two files that onnxruntime-genai reads
    genai_images.py    the image steps in one of them
    read.py            a written folder → weights
    inspect.py         what `vlmq-export inspect` shows of a folder
    proof/             levels L1 to L3 in ONNX Runtime and onnxruntime-genai

`import onnx` inside this package is the real onnx, because imports are absolute.
"""
