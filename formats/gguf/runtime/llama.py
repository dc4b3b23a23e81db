"""llama.cpp itself, through the C interface of the shared library inside the xllamacpp wheel.

The layouts of the structs are those of include/llama.h, ggml.h and tools/mtmd/mtmd.h at llama.cpp
b11549. They belong to one build. `load` therefore insists on the exact wheel, on the sizes of
structs and on the library's own default values before anything is passed by value. The module is
for a child process only (`worker.py`), because a failed GGML_ASSERT aborts the process.
"""

from __future__ import annotations

import ctypes as C
import importlib.metadata
import importlib.util
from _ctypes import CFuncPtr
from collections.abc import Callable
from ctypes import c_char_p as text
from ctypes import c_float as f32
from ctypes import c_int32 as i32
from ctypes import c_int64 as i64
from ctypes import c_size_t as size
from ctypes import c_uint32 as u32
from ctypes import c_void_p as ptr
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vlmq_export.errors import MissingRuntime

PIN = "2026.10.11549"  # version of xllamacpp, which has llama.cpp b11549
MUL_MAT, MUL_MAT_ID = 29, 30  # ggml_op
I32 = 26  # ggml_type
LOG_ERROR = 4  # ggml_log_level
TEXT, IMAGE = 0, 1  # mtmd_input_chunk_type

LogCallback = C.CFUNCTYPE(None, C.c_int, text, ptr)
NodeCallback = C.CFUNCTYPE(C.c_bool, ptr, C.c_bool, ptr)  # ggml_backend_sched_eval_callback


def _fields(declaration: str) -> list[tuple[str, type]]:
    """Fields of a ctypes struct from `type name name; type*count name; …`."""
    kinds = {
        "bool": C.c_bool,
        "i32": i32,
        "i64": i64,
        "u32": u32,
        "u64": size,
        "f32": f32,
        "ptr": ptr,
        "str": text,
    }
    fields = []
    for clause in declaration.split(";"):
        kind, *names = clause.split()
        base, _, count = kind.partition("*")
        fields += [(n, kinds[base] * int(count) if count else kinds[base]) for n in names]
    return fields


class ModelParams(C.Structure):
    """llama_model_params."""

    _fields_ = _fields(
        "ptr devices tensor_buft_overrides;"
        "i32 n_gpu_layers split_mode load_mode lazy_mode main_gpu;"
        "ptr tensor_split progress_callback progress_callback_user_data kv_overrides;"
        "bool vocab_only check_tensors use_extra_bufts no_host no_alloc load_mtp"
    )


class ContextParams(C.Structure):
    """llama_context_params."""

    _fields_ = _fields(
        "u32 n_ctx n_batch n_ubatch n_seq_max n_rs_seq n_outputs_max n_outputs_max_per_seq;"
        "i32 n_threads n_threads_batch;"
        "i32 ctx_type rope_scaling_type pooling_type attention_type flash_attn_type;"
        "f32 rope_freq_base rope_freq_scale;"
        "f32 yarn_ext_factor yarn_attn_factor yarn_beta_fast yarn_beta_slow;"
        "u32 yarn_orig_ctx; f32 defrag_thold; ptr cb_eval cb_eval_user_data;"
        "i32 type_k type_v; u64 moe_cache_size; ptr abort_callback abort_callback_data;"
        "bool embeddings offload_kqv no_perf op_offload swa_full kv_unified;"
        "ptr samplers; u64 n_samplers; ptr ctx_other"
    )


class Batch(C.Structure):
    """llama_batch."""

    _fields_ = _fields("i32 n_tokens; ptr token embd pos n_seq_id seq_id logits")


class MtmdParams(C.Structure):
    """mtmd_context_params."""

    _fields_ = _fields(
        "bool use_gpu; ptr device; bool print_timings; i32 n_threads;"
        "str image_marker media_marker; i32 flash_attn_type; bool warmup;"
        "i32 image_min_tokens image_max_tokens; ptr cb_eval cb_eval_user_data;"
        "i32 batch_max_tokens; ptr progress_callback progress_callback_user_data"
    )


class MtmdText(C.Structure):
    """mtmd_input_text."""

    _fields_ = _fields("str text; u64 text_len; bool add_special parse_special")


class Tensor(C.Structure):
    """ggml_tensor up to its name."""

    _fields_ = _fields(
        "i32 type; ptr buffer; i64*4 ne; u64*4 nb; i32 op; i32*16 op_params; i32 flags; ptr*10 src;"
        "ptr view_src; u64 view_offs; ptr data"
    )

    @property
    def name(self) -> str:
        """The name, which follows these fields in memory."""
        return C.string_at(C.addressof(self) + C.sizeof(Tensor)).decode("utf-8", "replace")

    def array(self) -> np.ndarray:
        """A copy of a float32 matrix, [ne1, ne0]. Raises ValueError for any other tensor."""
        cols, rows, *rest = self.ne
        if self.type != 0 or self.nb[0] != 4 or any(n != 1 for n in rest):
            raise ValueError(
                f"{self.name}: type {self.type}, shape {list(self.ne)} where a float32 matrix is"
                " expected"
            )
        raw = C.string_at(self.data, self.nb[1] * (rows - 1) + 4 * cols) if rows else b""
        flat = np.frombuffer(raw, np.float32)
        return np.lib.stride_tricks.as_strided(flat, (rows, cols), (self.nb[1], 4)).copy()

    def matrices(self) -> np.ndarray:
        """A copy of float32 or int32 matrices, [ne2, ne1, ne0]. Raises ValueError for others."""
        dtype = {0: np.float32, I32: np.int32}.get(self.type)
        cols, rows, count, last = self.ne
        if dtype is None or self.nb[0] != 4 or last != 1:
            raise ValueError(f"{self.name}: type {self.type}, shape {list(self.ne)}")
        span = self.nb[2] * (count - 1) + self.nb[1] * (rows - 1) + 4 * cols
        flat = np.frombuffer(C.string_at(self.data, span) if count * rows else b"", dtype)
        strides = self.nb[2], self.nb[1], 4
        return np.lib.stride_tricks.as_strided(flat, (count, rows, cols), strides).copy()


_SIZES = {ModelParams: 80, ContextParams: 168}  # bytes
# Function that returns default parameters → some of the values that it gives in this build.
_DEFAULTS = {
    "llama_model_default_params": {
        "n_gpu_layers": -1,
        "split_mode": 1,
        "load_mode": -1,
        "lazy_mode": 1,
        "use_extra_bufts": True,
        "check_tensors": False,
        "main_gpu": 0,
    },
    "llama_context_default_params": {
        "n_ctx": 512,
        "n_batch": 2048,
        "n_ubatch": 512,
        "n_seq_max": 1,
        "n_threads": 4,
        "flash_attn_type": -1,
        "yarn_ext_factor": -1.0,
        "type_k": 1,
        "type_v": 1,
        "offload_kqv": True,
        "n_samplers": 0,
    },
    "mtmd_context_params_default": {
        "use_gpu": True,
        "n_threads": 4,
        "flash_attn_type": -1,
        "warmup": True,
        "image_min_tokens": -1,
        "batch_max_tokens": 1024,
        "media_marker": b"<__media__>",
    },
}
# Function → its result and its arguments.
_FUNCTIONS = {
    "llama_backend_init": (None, []),
    "llama_log_set": (None, [LogCallback, ptr]),
    "mtmd_helper_log_set": (None, [LogCallback, ptr]),
    "llama_model_default_params": (ModelParams, []),
    "llama_context_default_params": (ContextParams, []),
    "mtmd_context_params_default": (MtmdParams, []),
    "llama_model_load_from_file": (ptr, [text, ModelParams]),
    "llama_init_from_model": (ptr, [ptr, ContextParams]),
    "llama_model_n_embd_inp": (i32, [ptr]),
    "llama_model_get_vocab": (ptr, [ptr]),
    "llama_vocab_n_tokens": (i32, [ptr]),
    "llama_get_memory": (ptr, [ptr]),
    "llama_memory_clear": (None, [ptr, C.c_bool]),
    "llama_decode": (i32, [ptr, Batch]),
    "llama_set_causal_attn": (None, [ptr, C.c_bool]),
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
    "mtmd_helper_decode_image_chunk": (
        i32,
        [ptr, ptr, ptr, C.POINTER(f32), i32, i32, i32, C.POINTER(i32), ptr, ptr],
    ),
}


class Library(C.CDLL):
    """llama.cpp's shared library with typed functions."""

    on_log: CFuncPtr  # must live as long as the library may call it


def library_path() -> Path:
    """Where the pinned wheel keeps its shared library. Nothing is imported.

    Raises MissingRuntime with one line where the wheel is missing or another one.
    """
    try:
        found = importlib.metadata.version("xllamacpp")
    except importlib.metadata.PackageNotFoundError:
        raise MissingRuntime(f"xllamacpp is not installed; pip install xllamacpp=={PIN}") from None
    if found != PIN:
        raise MissingRuntime(
            f"xllamacpp {found} is installed, its struct layouts are not known;"
            f" pip install xllamacpp=={PIN}"
        )
    spec = importlib.util.find_spec("xllamacpp")
    files = sorted(Path(spec.origin).parent.glob("xllamacpp*.so")) if spec and spec.origin else []
    if not files:
        raise MissingRuntime(
            f"xllamacpp {found} has no shared library on this platform; use Linux x86-64"
        )
    return files[0]


def load(log: Callable[[int, str], None]) -> Library:
    """The library.

    log: receives level and text of each line of llama.cpp's own log.

    Raises MissingRuntime where a struct or a default value is not that of the pinned build.
    """
    lib = Library(str(library_path()))
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    for struct, expected in _SIZES.items():
        if C.sizeof(struct) != expected:
            raise MissingRuntime(
                f"{struct.__name__} has {C.sizeof(struct)} bytes here, {expected} in xllamacpp"
                f" {PIN}"
            )
    for name, expected in _DEFAULTS.items():
        params = getattr(lib, name)()
        wrong = [k for k, v in expected.items() if getattr(params, k) != v]
        if wrong:
            raise MissingRuntime(
                f"{name} of xllamacpp has another default for {wrong[0]};"
                f" reinstall xllamacpp=={PIN}"
            )
    lib.on_log = LogCallback(
        lambda level, line, _: log(level, (line or b"").decode("utf-8", "replace"))
    )
    lib.llama_log_set(lib.on_log, None)
    lib.mtmd_helper_log_set(lib.on_log, None)
    lib.llama_backend_init()
    return lib


def _address(array: np.ndarray | None) -> int | None:
    return None if array is None else array.ctypes.data


class Model:
    """A loaded GGUF text model on the CPU. Its weights are as in the file, and not repacked.

    Raises RuntimeError for a file that llama.cpp refuses.
    """

    def __init__(self, lib: Library, path: str):
        params = lib.llama_model_default_params()
        params.n_gpu_layers, params.check_tensors, params.use_extra_bufts = 0, True, False
        self.lib = lib
        self.handle = lib.llama_model_load_from_file(str(path).encode(), params)
        if not self.handle:
            raise RuntimeError(f"llama.cpp refused {Path(path).name}")
        self.width: int = lib.llama_model_n_embd_inp(self.handle)  # columns of embeddings it takes
        self.vocabulary: int = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.handle))


class Context:
    """One sequence of tokens in a model, computed as exactly as llama.cpp can.

    Flash attention is off, the cache is float32, and a prompt is one micro-batch.
    """

    def __init__(
        self,
        model: Model,
        length: int,  # the most tokens
        threads: int,
        on_node: CFuncPtr | None = None,  # a NodeCallback
    ):
        params = model.lib.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = length
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = params.type_k = params.type_v = 0
        self._on_node = on_node  # must live as long as the context
        params.cb_eval = C.cast(on_node, ptr) if on_node else None
        self.model, self.lib, self.length = model, model.lib, length
        self.handle = self.lib.llama_init_from_model(model.handle, params)
        if not self.handle:
            raise RuntimeError(f"llama.cpp could not make a context of {length} tokens")

    def clear(self) -> None:
        """Forget every token."""
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.handle), True)

    def tokens(self, ids: np.ndarray, start: int, *, every: bool = True) -> np.ndarray:
        """Feed tokens at the positions start, start + 1, …. Returns logits as `_decode` does.

        ids: integers [n].
        """
        positions = start + np.arange(len(ids))
        return self._decode(np.ascontiguousarray(ids, np.int32), None, positions, every)

    def embeddings(
        self,
        rows: np.ndarray,
        positions: np.ndarray,
        *,
        every: bool = True,
        both_ways: bool = False,
    ) -> np.ndarray:
        """Feed embeddings. Returns logits as `_decode` does.

        rows: [n, width].
        positions: [n], or with M-RoPE [4, n]: time, height, width, 0.
        both_ways: whether each row sees the rows behind it too.
        """
        if rows.shape[1] != self.model.width:
            raise ValueError(
                f"embeddings have {rows.shape[1]} columns, the model takes {self.model.width}"
            )
        self.lib.llama_set_causal_attn(self.handle, not both_ways)
        try:
            return self._decode(None, np.ascontiguousarray(rows, np.float32), positions, every)
        finally:
            self.lib.llama_set_causal_attn(self.handle, True)

    def _decode(
        self,
        ids: np.ndarray | None,  # int32 [n]; None with `rows`
        rows: np.ndarray | None,  # float32 [n, width]; None with `ids`
        positions: np.ndarray,
        every: bool,
    ) -> np.ndarray:
        """Logits, float32 [n, vocabulary]; without `every`, those of the last position alone."""
        fed = ids if rows is None else rows
        assert fed is not None, "either ids or rows are fed"
        n = len(fed)
        pos = np.ascontiguousarray(positions, np.int32)
        counts, sequence = np.ones(n, np.int32), np.zeros(1, np.int32)
        sequences = np.full(n, sequence.ctypes.data, np.uintp)
        wanted = np.full(n, every, np.int8)
        wanted[-1] = 1
        arrays = (ids, rows, pos, counts, sequences, wanted)
        code = self.lib.llama_decode(self.handle, Batch(n, *(_address(a) for a in arrays)))
        if code:
            raise RuntimeError(f"llama_decode returned {code} for {n} tokens")
        found = (
            self.lib.llama_get_logits_ith(self.handle, i) for i in (range(n) if every else [n - 1])
        )
        shape = (self.model.vocabulary,)
        return np.stack([np.ctypeslib.as_array(logits, shape) for logits in found])


@dataclass(frozen=True)
class Seen:
    """What came of a prompt with images."""

    ids: np.ndarray  # int32 [S]: the tokens, −1 at image tokens
    logits: np.ndarray  # float32 [n, vocabulary], of the text positions, or of the last one alone
    image: np.ndarray  # float32 [image tokens, width]: the embeddings
    next: int  # the position after the prompt


class Vision:
    """mtmd's way from images to embeddings: an mmproj file beside a text model.

    Raises RuntimeError for a file that llama.cpp refuses.
    """

    def __init__(
        self,
        model: Model,
        path: str,
        threads: int,
        most: int = -1,  # tokens of an image; −1 leaves that to the file
        on_node: CFuncPtr | None = None,  # a NodeCallback
    ):
        params = model.lib.mtmd_context_params_default()
        params.use_gpu = params.print_timings = params.warmup = False
        params.n_threads, params.flash_attn_type = threads, 0
        params.image_max_tokens = most
        self._on_node = on_node  # must live as long as the mtmd context
        params.cb_eval = C.cast(on_node, ptr) if on_node else None
        self.model, self.lib = model, model.lib
        self.handle = self.lib.mtmd_init_from_file(str(path).encode(), model.handle, params)
        if not self.handle:
            raise RuntimeError(f"llama.cpp refused {Path(path).name}")

    def run(
        self,
        context: Context,
        prompt: str,  # with one <__media__> per image
        images: list[np.ndarray],  # uint8 [h, w, 3]
        *,
        newline: np.ndarray | None = None,  # [1, width]: fed after each image
        every: bool = True,  # whether the logits of all text positions are wanted
    ) -> Seen:
        """Feed a prompt to a context through mtmd, as an application would.

        newline is for a model that has such a row, because mtmd leaves it out.
        """
        images = [np.ascontiguousarray(a, np.uint8) for a in images]
        bitmaps = (ptr * len(images))(
            *(self.lib.mtmd_bitmap_init(a.shape[1], a.shape[0], a.ctypes.data) for a in images)
        )
        chunks = self.lib.mtmd_input_chunks_init()
        raw = prompt.encode()
        given = MtmdText(raw, len(raw), False, True)
        try:
            code = self.lib.mtmd_tokenize(self.handle, chunks, given, bitmaps, len(images))
            if code:
                raise RuntimeError(f"mtmd_tokenize returned {code}")
            return self._feed(context, chunks, newline, every)
        finally:
            self.lib.mtmd_input_chunks_free(chunks)
            for bitmap in bitmaps:
                self.lib.mtmd_bitmap_free(bitmap)

    def _feed(self, context: Context, chunks: int, newline: np.ndarray | None, every: bool) -> Seen:
        """Feed the chunks of text and images that mtmd made of a prompt."""
        ids, logits, rows, past = [], [], [], 0
        last = self.lib.mtmd_input_chunks_size(chunks) - 1
        for i in range(last + 1):
            chunk = self.lib.mtmd_input_chunks_get(chunks, i)
            kind = self.lib.mtmd_input_chunk_get_type(chunk)
            if kind == TEXT:
                tokens = self._tokens(chunk)
                out = context.tokens(tokens, past, every=every)
                logits += [out] if every or i == last else []
                ids.append(tokens)
                past += len(tokens)
            elif kind == IMAGE:
                embeddings, past = self._feed_image(context, chunk, past)
                rows.append(embeddings)
                if newline is not None:
                    context.embeddings(newline, past + np.arange(len(newline)), every=False)
                    rows.append(newline)
                    past += len(newline)
                more = len(embeddings) + (0 if newline is None else len(newline))
                ids.append(np.full(more, -1, np.int32))
            else:
                raise RuntimeError(f"mtmd made a chunk of kind {kind}")
        return Seen(np.concatenate(ids), np.concatenate(logits), np.concatenate(rows), past)

    def _tokens(self, chunk: int) -> np.ndarray:
        """The ids of a chunk of text, int32 [n]."""
        count = size()
        found = self.lib.mtmd_input_chunk_get_tokens_text(chunk, C.byref(count))
        return np.array(found[: count.value], np.int32)

    def _feed_image(self, context: Context, chunk: int, start: int) -> tuple[np.ndarray, int]:
        """Feed an image at position `start`: its embeddings, and the position after it."""
        n = self.lib.mtmd_input_chunk_get_n_tokens(chunk)
        if code := self.lib.mtmd_encode_chunk(self.handle, chunk):
            raise RuntimeError(f"mtmd_encode_chunk returned {code}")
        found = self.lib.mtmd_get_output_embd(self.handle)
        embeddings = np.ctypeslib.as_array(found, (n, self.model.width)).copy()
        after = i32(start)
        code = self.lib.mtmd_helper_decode_image_chunk(
            self.handle,
            context.handle,
            chunk,
            found,
            start,
            0,  # sequence
            context.length,  # tokens of a batch
            C.byref(after),
            None,
            None,
        )
        if code:
            raise RuntimeError(f"mtmd_helper_decode_image_chunk returned {code}")
        return embeddings, after.value
