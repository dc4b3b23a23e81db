"""llama.cpp itself, through the C interface of the shared library inside the xllamacpp wheel.

Struct layouts are those of include/llama.h, ggml.h and tools/mtmd/mtmd.h at llama.cpp b11549. They belong to one
build, so `load` insists on the exact wheel, on struct sizes and on the library's own default values before anything is
passed by value. Use it in a child process only (`worker.py`): a failed GGML_ASSERT aborts the process.
"""

from __future__ import annotations

import ctypes as C
import importlib.metadata
import importlib.util
from collections.abc import Callable
from ctypes import c_char_p as text
from ctypes import c_float as f32
from ctypes import c_int32 as i32
from ctypes import c_int64 as i64
from ctypes import c_size_t as size
from ctypes import c_uint32 as u32
from ctypes import c_void_p as ptr
from pathlib import Path

import numpy as np

from vlmq_export.errors import MissingRuntime

PIN = "2026.10.11549"  # of xllamacpp: llama.cpp b11549
MUL_MAT = 29  # ggml_op
LOG_ERROR = 4  # ggml_log_level
TEXT, IMAGE = 0, 1  # mtmd_input_chunk_type

LogCallback = C.CFUNCTYPE(None, C.c_int, text, ptr)
NodeCallback = C.CFUNCTYPE(C.c_bool, ptr, C.c_bool, ptr)


def _fields(declaration: str) -> list[tuple[str, type]]:
    """`type name name; type*count name; …` → ctypes fields."""
    kinds = {"bool": C.c_bool, "i32": i32, "i64": i64, "u32": u32, "u64": size, "f32": f32, "ptr": ptr, "str": text}
    fields = []
    for clause in declaration.split(";"):
        kind, *names = clause.split()
        base, _, count = kind.partition("*")
        fields += [(n, kinds[base] * int(count) if count else kinds[base]) for n in names]
    return fields


class ModelParams(C.Structure):
    _fields_ = _fields(
        "ptr devices tensor_buft_overrides; i32 n_gpu_layers split_mode load_mode lazy_mode main_gpu;"
        "ptr tensor_split progress_callback progress_callback_user_data kv_overrides;"
        "bool vocab_only check_tensors use_extra_bufts no_host no_alloc load_mtp"
    )


class ContextParams(C.Structure):
    _fields_ = _fields(
        "u32 n_ctx n_batch n_ubatch n_seq_max n_rs_seq n_outputs_max n_outputs_max_per_seq; i32 n_threads n_threads_batch;"
        "i32 ctx_type rope_scaling_type pooling_type attention_type flash_attn_type;"
        "f32 rope_freq_base rope_freq_scale yarn_ext_factor yarn_attn_factor yarn_beta_fast yarn_beta_slow;"
        "u32 yarn_orig_ctx; f32 defrag_thold; ptr cb_eval cb_eval_user_data; i32 type_k type_v; u64 moe_cache_size;"
        "ptr abort_callback abort_callback_data; bool embeddings offload_kqv no_perf op_offload swa_full kv_unified;"
        "ptr samplers; u64 n_samplers; ptr ctx_other"
    )


class Batch(C.Structure):
    _fields_ = _fields("i32 n_tokens; ptr token embd pos n_seq_id seq_id logits")


class MtmdParams(C.Structure):
    _fields_ = _fields(
        "bool use_gpu; ptr device; bool print_timings; i32 n_threads; str image_marker media_marker; i32 flash_attn_type;"
        "bool warmup; i32 image_min_tokens image_max_tokens; ptr cb_eval cb_eval_user_data; i32 batch_max_tokens;"
        "ptr progress_callback progress_callback_user_data"
    )


class MtmdText(C.Structure):
    _fields_ = _fields("str text; u64 text_len; bool add_special parse_special")


class Tensor(C.Structure):
    """The head of ggml_tensor; `name` follows it."""

    _fields_ = _fields(
        "i32 type; ptr buffer; i64*4 ne; u64*4 nb; i32 op; i32*16 op_params; i32 flags; ptr*10 src; ptr view_src;"
        "u64 view_offs; ptr data"
    )

    @property
    def name(self) -> str:
        return C.string_at(C.addressof(self) + C.sizeof(Tensor)).decode("utf-8", "replace")

    def array(self) -> np.ndarray:
        """A copy of a float32 tensor's rows, [ne1, ne0]."""
        cols, rows, *rest = self.ne
        if self.type != 0 or self.nb[0] != 4 or any(n != 1 for n in rest):
            raise ValueError(f"{self.name}: type {self.type}, shape {list(self.ne)} where a float32 matrix is expected")
        raw = C.string_at(self.data, self.nb[1] * (rows - 1) + 4 * cols) if rows else b""
        flat = np.frombuffer(raw, np.float32)
        return np.lib.stride_tricks.as_strided(flat, (rows, cols), (self.nb[1], 4)).copy()


_SIZES = {ModelParams: 80, ContextParams: 168}
_DEFAULTS = {
    "llama_model_default_params": {"n_gpu_layers": -1, "split_mode": 1, "load_mode": -1, "lazy_mode": 1, "use_extra_bufts": True,
                                   "check_tensors": False, "main_gpu": 0},
    "llama_context_default_params": {"n_ctx": 512, "n_batch": 2048, "n_ubatch": 512, "n_seq_max": 1, "n_threads": 4,
                                     "flash_attn_type": -1, "yarn_ext_factor": -1.0, "type_k": 1, "type_v": 1,
                                     "offload_kqv": True, "n_samplers": 0},
    "mtmd_context_params_default": {"use_gpu": True, "n_threads": 4, "flash_attn_type": -1, "warmup": True,
                                    "image_min_tokens": -1, "batch_max_tokens": 1024, "media_marker": b"<__media__>"},
}  # fmt: skip
# function: (result, arguments)
_FUNCTIONS = {
    "llama_backend_init": (None, []),
    "llama_log_set": (None, [LogCallback, ptr]),
    "mtmd_helper_log_set": (None, [LogCallback, ptr]),
    "llama_model_default_params": (ModelParams, []),
    "llama_context_default_params": (ContextParams, []),
    "mtmd_context_params_default": (MtmdParams, []),
    "llama_model_load_from_file": (ptr, [text, ModelParams]),
    "llama_init_from_model": (ptr, [ptr, ContextParams]),
    "llama_free": (None, [ptr]),
    "llama_model_n_embd_inp": (i32, [ptr]),
    "llama_model_get_vocab": (ptr, [ptr]),
    "llama_vocab_n_tokens": (i32, [ptr]),
    "llama_get_memory": (ptr, [ptr]),
    "llama_memory_clear": (None, [ptr, C.c_bool]),
    "llama_decode": (i32, [ptr, Batch]),
    "llama_get_logits_ith": (C.POINTER(f32), [ptr, i32]),
    "mtmd_init_from_file": (ptr, [text, ptr, MtmdParams]),
    "mtmd_bitmap_init": (ptr, [u32, u32, ptr]),
    "mtmd_bitmap_free": (None, [ptr]),
    "mtmd_input_chunks_init": (ptr, []),
    "mtmd_input_chunks_size": (size, [ptr]),
    "mtmd_input_chunks_get": (ptr, [ptr, size]),
    "mtmd_input_chunks_free": (None, [ptr]),
    "mtmd_input_chunk_get_type": (C.c_int, [ptr]),
    "mtmd_input_chunk_get_tokens_text": (C.POINTER(i32), [ptr, C.POINTER(size)]),
    "mtmd_input_chunk_get_n_tokens": (size, [ptr]),
    "mtmd_tokenize": (i32, [ptr, ptr, C.POINTER(MtmdText), C.POINTER(ptr), size]),
    "mtmd_encode_chunk": (i32, [ptr, ptr]),
    "mtmd_get_output_embd": (C.POINTER(f32), [ptr]),
    "mtmd_helper_decode_image_chunk": (i32, [ptr, ptr, ptr, C.POINTER(f32), i32, i32, i32, C.POINTER(i32), ptr, ptr]),
}  # fmt: skip


def library_path() -> Path:
    """Where the pinned wheel keeps its shared library; nothing is imported. Raises MissingRuntime in one line."""
    try:
        found = importlib.metadata.version("xllamacpp")
    except importlib.metadata.PackageNotFoundError:
        raise MissingRuntime(f"xllamacpp is not installed; pip install xllamacpp=={PIN}") from None
    if found != PIN:
        raise MissingRuntime(
            f"xllamacpp {found} is installed, its struct layouts are not known; pip install xllamacpp=={PIN}"
        )
    spec = importlib.util.find_spec("xllamacpp")
    files = sorted(Path(spec.origin).parent.glob("xllamacpp*.so")) if spec and spec.origin else []
    if not files:
        raise MissingRuntime(f"xllamacpp {found} has no shared library on this platform; use Linux x86-64")
    return files[0]


def load(log: Callable[[int, str], None]) -> C.CDLL:
    """The library with typed functions, guarded. `log` receives level and text of llama.cpp's own log."""
    lib = C.CDLL(str(library_path()))
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    for struct, expected in _SIZES.items():
        if C.sizeof(struct) != expected:
            raise MissingRuntime(f"{struct.__name__} has {C.sizeof(struct)} bytes here, {expected} in xllamacpp {PIN}")
    for name, expected in _DEFAULTS.items():
        params = getattr(lib, name)()
        wrong = [k for k, v in expected.items() if getattr(params, k) != v]
        if wrong:
            raise MissingRuntime(f"{name} of xllamacpp has another default for {wrong[0]}; reinstall xllamacpp=={PIN}")
    lib.keep = LogCallback(lambda level, line, _: log(level, (line or b"").decode("utf-8", "replace")))
    lib.llama_log_set(lib.keep, None)
    lib.mtmd_helper_log_set(lib.keep, None)
    lib.llama_backend_init()
    return lib


def _address(array: np.ndarray | None) -> int | None:
    return None if array is None else array.ctypes.data


class Model:
    """A loaded GGUF text model, on the CPU, weights as they lie in the file (no repacking)."""

    def __init__(self, lib: C.CDLL, path: str):
        params = lib.llama_model_default_params()
        params.n_gpu_layers, params.check_tensors, params.use_extra_bufts = 0, True, False
        self.lib = lib
        self.handle = lib.llama_model_load_from_file(str(path).encode(), params)
        if not self.handle:
            raise RuntimeError(f"llama.cpp refused {Path(path).name}")
        self.width = lib.llama_model_n_embd_inp(self.handle)
        self.vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.handle))


class Context:
    """One sequence in exact settings: flash attention off, float32 cache, one micro-batch a prompt."""

    def __init__(self, model: Model, length: int, threads: int, on_node: NodeCallback | None = None):
        params = model.lib.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = length
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = params.type_k = params.type_v = 0
        self._on_node = on_node  # kept alive as long as the context
        params.cb_eval = C.cast(on_node, ptr) if on_node else None
        self.model, self.lib, self.length = model, model.lib, length
        self.handle = self.lib.llama_init_from_model(model.handle, params)
        if not self.handle:
            raise RuntimeError(f"llama.cpp could not make a context of {length} tokens")

    def clear(self) -> None:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.handle), True)

    def close(self) -> None:
        self.lib.llama_free(self.handle)

    def tokens(self, ids: np.ndarray, start: int, *, every: bool = True) -> np.ndarray:
        """Feed token ids at positions start, start+1, …; float32 logits [n, vocabulary] of all, or of the last."""
        return self._decode(np.ascontiguousarray(ids, np.int32), None, start + np.arange(len(ids)), every)

    def embeddings(self, rows: np.ndarray, positions: np.ndarray, *, every: bool = True) -> np.ndarray:
        """Feed [n, width] rows at positions [n], or with M-RoPE [4, n] (t, h, w, 0)."""
        if rows.shape[1] != self.model.width:
            raise ValueError(f"embeddings have {rows.shape[1]} columns, the model takes {self.model.width}")
        return self._decode(None, np.ascontiguousarray(rows, np.float32), positions, every)

    def _decode(
        self, ids: np.ndarray | None, rows: np.ndarray | None, positions: np.ndarray, every: bool
    ) -> np.ndarray:
        n = len(ids) if rows is None else len(rows)
        pos = np.ascontiguousarray(positions, np.int32)
        counts, sequence, wanted = np.ones(n, np.int32), np.zeros(1, np.int32), np.full(n, every, np.int8)
        wanted[-1] = 1
        sequences = np.full(n, sequence.ctypes.data, np.uintp)
        arrays = (ids, rows, pos, counts, sequences, wanted)
        code = self.lib.llama_decode(self.handle, Batch(n, *(_address(a) for a in arrays)))
        if code:
            raise RuntimeError(f"llama_decode returned {code} for {n} tokens")
        size = self.model.vocabulary
        indices = range(n) if every else [n - 1]
        return np.stack(
            [np.ctypeslib.as_array(self.lib.llama_get_logits_ith(self.handle, i), (size,)) for i in indices]
        )


class Vision:
    """The mtmd image path: an mmproj file beside a text model."""

    def __init__(self, model: Model, path: str, threads: int, on_node: NodeCallback | None = None):
        params = model.lib.mtmd_context_params_default()
        params.use_gpu = params.print_timings = params.warmup = False
        params.n_threads, params.flash_attn_type = threads, 0
        self._on_node = on_node
        params.cb_eval = C.cast(on_node, ptr) if on_node else None
        self.model, self.lib = model, model.lib
        self.handle = self.lib.mtmd_init_from_file(str(path).encode(), model.handle, params)
        if not self.handle:
            raise RuntimeError(f"llama.cpp refused {Path(path).name}")

    def run(
        self,
        context: Context,
        prompt: str,
        images: list[np.ndarray],
        *,
        newline: np.ndarray | None = None,
        every: bool = True,
    ) -> dict:
        """A prompt with one `<__media__>` an image ([h, w, 3] uint8) through mtmd, as an application would; `newline`
        [1, width] is fed behind each image, for a model that has such a row and mtmd leaves it out.

        Returns ids [S] (−1 at image tokens), logits of the text positions [n, vocabulary] (or of the last one), image
        embeddings [image tokens, hidden], and the next position.
        """
        images = [np.ascontiguousarray(a, np.uint8) for a in images]
        bitmaps = (ptr * len(images))(
            *(self.lib.mtmd_bitmap_init(a.shape[1], a.shape[0], a.ctypes.data) for a in images)
        )
        chunks = self.lib.mtmd_input_chunks_init()
        raw = prompt.encode()
        try:
            code = self.lib.mtmd_tokenize(
                self.handle, chunks, MtmdText(raw, len(raw), False, True), bitmaps, len(images)
            )
            if code:
                raise RuntimeError(f"mtmd_tokenize returned {code}")
            return self._chunks(context, chunks, newline, every)
        finally:
            self.lib.mtmd_input_chunks_free(chunks)
            for bitmap in bitmaps:
                self.lib.mtmd_bitmap_free(bitmap)

    def _chunks(self, context: Context, chunks: int, newline: np.ndarray | None, every: bool) -> dict:
        lib, ids, logits, rows, past, count = self.lib, [], [], [], i32(0), size()
        last = lib.mtmd_input_chunks_size(chunks) - 1
        for i in range(last + 1):
            chunk = lib.mtmd_input_chunks_get(chunks, i)
            kind = lib.mtmd_input_chunk_get_type(chunk)
            if kind == TEXT:
                found = lib.mtmd_input_chunk_get_tokens_text(chunk, C.byref(count))
                tokens = np.array(found[: count.value], np.int32)
                out = context.tokens(tokens, past.value, every=every)
                logits += [out] if every or i == last else []
                ids.append(tokens)
                past.value += len(tokens)
            elif kind == IMAGE:
                n = lib.mtmd_input_chunk_get_n_tokens(chunk)
                if code := lib.mtmd_encode_chunk(self.handle, chunk):
                    raise RuntimeError(f"mtmd_encode_chunk returned {code}")
                found = lib.mtmd_get_output_embd(self.handle)
                rows.append(np.ctypeslib.as_array(found, (n, self.model.width)).copy())
                ids.append(np.full(n, -1, np.int32))
                code = lib.mtmd_helper_decode_image_chunk(
                    self.handle, context.handle, chunk, found, past.value, 0, context.length, C.byref(past), None, None
                )
                if code:
                    raise RuntimeError(f"mtmd_helper_decode_image_chunk returned {code}")
                if newline is not None:
                    context.embeddings(newline, past.value + np.arange(len(newline)), every=False)
                    rows.append(newline)
                    ids.append(np.full(len(newline), -1, np.int32))
                    past.value += len(newline)
            else:
                raise RuntimeError(f"mtmd made a chunk of kind {kind}")
        return {
            "ids": np.concatenate(ids),
            "logits": np.concatenate(logits),
            "image": np.concatenate(rows),
            "next": past.value,
        }
