"""compressed-tensors: the whole VLM in the folder layout that vLLM and SGLang load.

The layout is the one that the library calls `pack-quantized`.

A quantized linear `X` with N outputs, K inputs and G groups has these tensors in place of
`X.weight` [N, K]:

    X.weight_packed       int32   [N, K·bits/32]   codes, packed along K
    X.weight_scale        float16 [N, G]
    X.weight_zero_point   int32   [N·bits/32, G]   packed along N; only where there are zero-points
    X.weight_shape        int64   [2]              N and K
    X.bias                float16 [N]              only where the linear has one

It decodes as `weight[n, k] = scale[n, g] · (code[n, k] − zero[n, g])` with g = k // group_size.
Groups are neighbouring columns: the library took `weight_g_idx` out in 0.20, and vLLM in 0.33.
Without zero-points, zero is 2^(bits−1). Values are packed as one stream of bits, least significant
bit first, and the last word of a row is filled with zeros.

    plan.py, layout.py     what a folder holds, and what is refused
    write.py               artifact → folder, by the library's own classes
    read.py, inspect.py    folder → weights, by code that shares nothing with writer and library
    runtimes.py            which programs load which files
    proof/                 levels L1 to L3 in transformers with compressed-tensors

`import compressed_tensors` inside this package is the real library, because imports are absolute.
"""
