"""What a small random checkpoint of each family consists of besides its weights."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tools.reference_vlm.tiny_configs import (
    GEMMA3,
    GEMMA_IMAGE,
    INTERNVL,
    INTERNVL3_5,
    INTERNVL_IMAGE,
    LLAVA_ONEVISION,
    MINISTRAL3,
    MISTRAL3,
    PINPOINTS,
    PIXTRAL_IMAGE,
    QWEN3_5,
    QWEN3_VL,
    QWEN3_VL_MOE,
    SIGLIP_IMAGE,
    SMOLVLM_IMAGE,
    smolvlm_config,
)


@dataclass(frozen=True)
class Tiny:
    """What one family's checkpoint consists of besides its weights."""

    tokens: tuple[str, ...]  # special tokens that Qwen2-VL's vocabulary lacks
    template: str  # of the chat
    config: dict  # config.json with slots
    preprocessor: dict  # preprocessor_config.json
    processor: dict | None = None  # processor_config.json
    tokenizer: dict | None = None  # extra_special_tokens of tokenizer_config.json
    tokenizer_config: dict | None = None  # what it has other than that of Qwen2-VL
    pre_tokenizer: dict | None = None  # of tokenizer.json; None: that of Qwen2-VL
    joined: tuple[str, ...] = ()  # pairs of characters that the vocabulary has as one token
    pieces: bool = False  # whether the tokenizer is one of characters, in the form of Gemma's
    gain: float = 0.0  # what the decoder's norms add to their weights
    extra: tuple[
        str, ...
    ] = ()  # prefixes of tensors that the published files hold beside the model
    end: str = "<|im_end|>"  # of a turn
    begin: str = "<|endoftext|>"  # of a text
    pad: str = "<|endoftext|>"
    names: tuple[tuple[str, str], ...] = ()  # prefixes (module, hub) of tensors; the first counts


# --- chat templates -------------------------------------------------------------------------------

_TURNS = (
    "{%% for m in messages %%}%s{%% endfor %%}"
    "{%% if add_generation_prompt %%}<|im_start|>assistant\n{%% endif %%}"
)
_PARTS = (
    "<|im_start|>{{ m['role'] }}\n"
    "{%% if m['content'] is string %%}{{ m['content'] }}{%% else %%}"
    "{%% for c in m['content'] %%}{%% if c['type'] == 'image' %%}%s"
    "{%% elif c['type'] == 'text' %%}{{ c['text'] }}"
    "{%% endif %%}{%% endfor %%}{%% endif %%}<|im_end|>\n"
)
# As published: a space after the role, images first, a newline before each text, and none after
# <|im_end|>.
_LLAVA_TURN = (
    "{{ '<|im_start|>' + m['role'] + ' ' }}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'image') %}<image>{% endfor %}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ '\n' + c['text'] }}{% endfor %}<|im_end|>"
)
# As published: no line break after the role, and no space between it and an image.
_SMOLVLM_TURNS = (
    "<|im_start|>{% for m in messages %}{{ m['role'] | capitalize }}"
    "{% if m['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}"
    "{% elif c['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)

# As published: the system's words go before the first turn of the user, and an answer is `model`.
_GEMMA_TURNS = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{% set first = messages[0]['content'][0]['text'] + '\n\n' %}{% set turns = messages[1:] %}"
    "{% else %}{% set first = '' %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}"
    "{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + (first if loop.first else '') }}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}{{ '<start_of_image>' }}"
    "{% elif c['type'] == 'text' %}{{ c['text'] | trim }}{% endif %}{% endfor %}"
    "{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)

# As published, but for the default system message, which is shorter: a user's image goes before
# the text, and nothing opens an answer.
_MISTRAL_TURNS = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{% set system = messages[0]['content'][0]['text'] %}{% set turns = messages[1:] %}"
    "{% else %}{% set system = 'You answer briefly.' %}{% set turns = messages %}{% endif %}"
    "{{ '[SYSTEM_PROMPT]' + system + '[/SYSTEM_PROMPT]' }}"
    "{% for m in turns %}{% if m['role'] == 'user' %}{{ '[INST]' }}"
    "{% set blocks = m['content'] | sort(attribute='type') if m['content'] | length == 2"
    " else m['content'] %}"
    "{% for c in blocks %}{% if c['type'] == 'image' %}{{ '[IMG]' }}"
    "{% elif c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}{{ '[/INST]' }}"
    "{% else %}{{ m['content'][0]['text'] + eos_token }}{% endif %}{% endfor %}"
)

# --- families -------------------------------------------------------------------------------------

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
CLIP = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
_IMAGE_STEPS = {
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
}
_DECODER_NAMES = (
    ("lm_head.", "language_model.lm_head."),
    ("model.language_model.", "language_model.model."),
    ("model.", ""),
)

# SmolVLM's words: a place for each tile of a grid, and the tokens around an image.
_SMOLVLM_WORDS = (
    "<global-img>",
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
    "<fake_token_around_image>",
    "<image>",
    "<end_of_utterance>",
)
_DIGITS_APART = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    ],
}

# As Qwen2-VL's, but marks of letters belong to words.
_MARKS_IN_WORDS = {
    "type": "Sequence",
    "pretokenizers": [
        {
            "type": "Split",
            "pattern": {
                "Regex": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}|"
                r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
            },
            "behavior": "Isolated",
            "invert": False,
        },
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
    ],
}


def _split_by(pattern: str) -> dict:
    """The pre-tokenizer of a tokenizer.json that splits texts by a pattern, then into bytes."""
    return {
        "type": "Sequence",
        "pretokenizers": [
            {
                "type": "Split",
                "pattern": {"Regex": pattern},
                "behavior": "Isolated",
                "invert": False,
            },
            {
                "type": "ByteLevel",
                "add_prefix_space": False,
                "trim_offsets": True,
                "use_regex": False,
            },
        ],
    }


# As published with Mistral Small 3.1: the pattern of Llama 3. Ministral 3 has Mistral's own.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _smolvlm_tiny(config: dict, processor: str, *, splitting: bool) -> Tiny:
    """SmolVLM, or SmolVLM2. `processor` is the start of the names of its processors."""
    return Tiny(
        tokens=_SMOLVLM_WORDS,
        template=_SMOLVLM_TURNS,
        config=config,
        preprocessor={
            **_IMAGE_STEPS,
            **HALF,
            "do_image_splitting": splitting,
            "do_pad": True,
            "image_processor_type": f"{processor}ImageProcessor",
            "max_image_size": {"longest_edge": SMOLVLM_IMAGE},
            "processor_class": f"{processor}Processor",
            "resample": 1,
            "size": {"longest_edge": 2 * SMOLVLM_IMAGE},
        },
        processor={
            "image_seq_len": (SMOLVLM_IMAGE // 28) ** 2,
            "processor_class": f"{processor}Processor",
        },
        tokenizer={
            "end_of_utterance_token": "<end_of_utterance>",
            "fake_image_token": "<fake_token_around_image>",
            "global_image_token": "<global-img>",
            "image_token": "<image>",
        },
        pre_tokenizer=_DIGITS_APART,
        joined=("ĊĊ",),
        end="<end_of_utterance>",
    )


FAMILIES = {
    "idefics3": _smolvlm_tiny(
        smolvlm_config("idefics3", "Idefics3ForConditionalGeneration"), "Idefics3", splitting=True
    ),
    "smolvlm": _smolvlm_tiny(
        smolvlm_config("smolvlm", "SmolVLMForConditionalGeneration"), "SmolVLM", splitting=False
    ),
    "llava_onevision": Tiny(
        tokens=("<image>", "<video>"),
        template=_TURNS % _LLAVA_TURN,
        config=LLAVA_ONEVISION,
        preprocessor={
            **_IMAGE_STEPS,
            **HALF,
            "do_pad": True,
            "image_grid_pinpoints": PINPOINTS,
            "image_processor_type": "LlavaOnevisionImageProcessor",
            "processor_class": "LlavaOnevisionProcessor",
            "size": {"height": SIGLIP_IMAGE, "width": SIGLIP_IMAGE},
        },
        processor={
            "image_token": "<image>",
            "num_image_tokens": (SIGLIP_IMAGE // 14) ** 2,
            "video_token": "<video>",
            "processor_class": "LlavaOnevisionProcessor",
            "vision_feature_select_strategy": "full",
        },
        names=(
            # transformers 5.6 took the level `vision_model` out.
            ("model.vision_tower.vision_model.", "vision_tower.vision_model."),
            ("model.vision_tower.", "vision_tower.vision_model."),
            *_DECODER_NAMES,
        ),
    ),
    "internvl": Tiny(
        tokens=("<img>", "</img>", "<IMG_CONTEXT>", "<video>"),
        template=_TURNS % (_PARTS % "<IMG_CONTEXT>\n"),
        config=INTERNVL,
        preprocessor={
            **_IMAGE_STEPS,
            **IMAGENET,
            "crop_to_patches": False,
            "image_processor_type": "GotOcr2ImageProcessorFast",
            "max_patches": 12,
            "min_patches": 1,
            "processor_class": "InternVLProcessor",
            "size": {"height": INTERNVL_IMAGE, "width": INTERNVL_IMAGE},
        },
        processor={
            "image_seq_length": (INTERNVL_IMAGE // 28) ** 2,
            "processor_class": "InternVLProcessor",
        },
        tokenizer={
            "context_image_token": "<IMG_CONTEXT>",
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "video_token": "<video>",
        },
        names=_DECODER_NAMES,
    ),
    "gemma3": Tiny(
        tokens=(
            "<start_of_turn>",
            "<end_of_turn>",
            "<start_of_image>",
            "<end_of_image>",
            "<image_soft_token>",
        ),
        template=_GEMMA_TURNS,
        config=GEMMA3,
        preprocessor={
            **_IMAGE_STEPS,
            **HALF,
            "do_convert_rgb": None,
            "do_pan_and_scan": None,
            "image_processor_type": "Gemma3ImageProcessor",
            "image_seq_length": 16,
            "pan_and_scan_max_num_crops": None,
            "pan_and_scan_min_crop_size": None,
            "pan_and_scan_min_ratio_to_activate": None,
            "processor_class": "Gemma3Processor",
            "resample": 2,
            "size": {"height": GEMMA_IMAGE, "width": GEMMA_IMAGE},
        },
        processor={"image_seq_length": 16, "processor_class": "Gemma3Processor"},
        tokenizer={
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        },
        pieces=True,
        gain=1.0,
        end="<end_of_turn>",
        begin="<bos>",
        pad="<pad>",
        names=(("model.vision_tower.", "vision_tower.vision_model."), *_DECODER_NAMES),
    ),
    "mistral3": Tiny(
        tokens=(
            *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
            *("[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]"),
        ),
        template=_MISTRAL_TURNS,
        config=MISTRAL3,
        preprocessor={
            **_IMAGE_STEPS,
            **CLIP,
            "default_to_square": True,
            "image_processor_type": "PixtralImageProcessorFast",
            "patch_size": 14,
            "processor_class": "PixtralProcessor",
            "size": {"longest_edge": PIXTRAL_IMAGE},
        },
        processor={
            "image_break_token": "[IMG_BREAK]",
            "image_end_token": "[IMG_END]",
            "image_token": "[IMG]",
            "patch_size": 14,
            "processor_class": "PixtralProcessor",
            "spatial_merge_size": 2,
        },
        tokenizer_config={
            "bos_token": "<s>",
            "eos_token": "</s>",
            "pad_token": "<pad>",
            "tokenizer_class": "LlamaTokenizerFast",
            "unk_token": "<unk>",
        },
        pre_tokenizer=_split_by(_LLAMA3),
        end="</s>",
        begin="<s>",
        pad="<pad>",
        names=_DECODER_NAMES,
    ),
    "qwen3_vl": Tiny(
        tokens=(),
        template=_TURNS % (_PARTS % "<|vision_start|><|image_pad|><|vision_end|>"),
        config=QWEN3_VL,
        preprocessor={
            **_IMAGE_STEPS,
            **HALF,
            "image_processor_type": "Qwen2VLImageProcessorFast",
            "merge_size": 2,
            "patch_size": 16,
            "processor_class": "Qwen3VLProcessor",
            "size": {"longest_edge": 65536, "shortest_edge": 8192},
            "temporal_patch_size": 2,
        },
    ),
}

FAMILIES["qwen3_vl_moe"] = replace(FAMILIES["qwen3_vl"], config=QWEN3_VL_MOE)
FAMILIES["qwen3_5"] = replace(
    FAMILIES["qwen3_vl"],
    config=QWEN3_5,
    pre_tokenizer=_MARKS_IN_WORDS,
    tokenizer_config={"tokenizer_class": "Qwen2Tokenizer"},
    gain=1.0,
    extra=("mtp.fc", "mtp.layers.0.mlp.up_proj"),
)
FAMILIES["internvl3_5"] = replace(FAMILIES["internvl"], config=INTERNVL3_5)
FAMILIES["ministral3"] = replace(
    FAMILIES["mistral3"], config=MINISTRAL3, pre_tokenizer=_split_by(_TEKKEN)
)
ARCHES = ("qwen2_vl", "qwen2_5_vl", *FAMILIES)  # all that make_tiny makes
SPARSE = ("qwen3_vl_moe",)  # those with experts, which compressed-tensors has not
PIXTRAL = ("mistral3", "ministral3")  # those with Pixtral's tower
