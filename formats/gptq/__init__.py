"""GPTQ safetensors: the whole VLM in the folder layout that transformers and GPTQModel load.

A quantized linear `X` with N outputs, K inputs and G groups has these tensors in place of
`X.weight` [N, K]:

    X.qweight  int32   [K·bits/32, N]   codes, packed along K
    X.qzeros   int32   [G, N·bits/32]   zero-points (v1: minus one), packed along N
    X.scales   float16 [G, N]
    X.g_idx    int32   [K]              group of each input column, columns in their original order
    X.bias     float16 [N]              only where the linear has one

It decodes as `weight[n, k] = scales[g, n] · (codes[n, k] − zeros[g, n])` with g = g_idx[k].

Values are packed as one stream of bits, least significant bit first. Value i takes the bits
[i·bits, (i+1)·bits) of its row or column, even where they cross a 32-bit word. With 3 bits, 32
values fill 3 words.

    plan.py, layout.py     what a folder holds, and what is refused
    packing.py, write.py   artifact → folder
    read.py, inspect.py    folder → weights, by code that shares nothing with the writer
    imports/               a GPTQ checkpoint that others made → artifact
    proof/                 levels L1 to L3 in transformers with gptqmodel, and AutoGPTQ's decoder
"""
