"""What the formats that transformers loads have in common: a folder of safetensors, and its proof.

A quantized linear has its parts in place of its weight. Everything else lies in the folder as it
was in the source.

    files.py       artifact → folder: its tensors in order, shards, and the files beside them
    read.py        folder → weights, by code that shares nothing with the writer
    runtimes.py    which programs load which files, and how we know
    proof/         a process that loads the folder in transformers, and the rows that it gives
"""
