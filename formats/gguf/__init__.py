"""GGUF for llama.cpp: a text model, and an mmproj file for the vision side.

plan.py          what would be written: block types, sizes, refusals
tables/          what llama.cpp calls each family, its sizes and its tensors
types/           GGML's block types, which of them holds a grid exactly, and the mixes
files/           the container, its metadata, and the three files
write.py         an artifact becomes files
completeness.py  whether a file has all that llama.cpp needs
read.py          the three readers that the proof compares
inspect.py       what is in a file
requirements.py  the packages that are needed
runtime/         llama.cpp in a child process
proof/           levels L1 to L3
"""
