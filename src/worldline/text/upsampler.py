"""Prompt upsamplers: a short prompt into a long one, or a picture into a prompt.

Source: nvidia-cosmos/cosmos-predict1 `diffusion/prompt_upsampler/` and, before it, NVIDIA/Cosmos
`cosmos1/models/diffusion/prompt_upsampler/`. The networks are those of transformers: Mistral-NeMo,
and Pixtral as Llava. Released files pair neighbouring numbers where they rotate, and transformers
the halves of a head: rows of queries and keys change places when such a file is read.

The released code asks in words of its own; these here are the project's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from worldline.errors import CheckpointError, Error
from worldline.files import read_json, unfinished
from worldline.weights.keymap import KeyMap
from worldline.weights.networks import pretrained, pretrained_tokenizer
from worldline.weights.read import Checkpoint, open_checkpoint
from worldline.weights.stream import load_into

LENGTHEN = "Expand this short caption of a video into a long caption, in one paragraph: "
DESCRIBE = (
    "Describe this as a video, in at most 150 words: refined, concise, about what is in it alone. "
    "No introduction, no filler, no remarks on style, nothing that is outside of the video."
)
IMAGE, ROW_END, IMAGE_END = "[IMG]", "[IMG_BREAK]", "[IMG_END]"
LARGEST_SIDE = 1024
# of the vision half, where the folder holds no preprocessor_config.json
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Drawing:
    """How an answer is drawn.

    Attributes:
        temperature: so low that it is nearly greedy.
        top_p: mass of the likely tokens that may be drawn.
        longest: tokens of an answer.
        room: tokens of question and answer together.
    """

    temperature: float
    top_p: float
    longest: int
    room: int


OF_TEXT = Drawing(0.01, 1.0, 512, 1024)
OF_IMAGE = Drawing(0.01, 0.9, 400, 4300)


def clean(text: str) -> str:
    """Return an answer of the text upsampler as one line without headings and marks."""
    text = re.sub(r"[\n\r]", " ", text)

    def heading(found: re.Match[str]) -> str:
        return "" if len(re.findall(r"\w+", found[1])) < 10 else found[0]

    text = re.sub(r"- \*\*(.*?)\*\*", heading, text)
    for mark in ("Caption:", "#####", "####", "- ", "* ", ","):
        if text.startswith(mark):
            text = text[len(mark) :].lstrip()
    return " ".join(text.split()).strip(" -,*:\"'“”")


def shrunk(width: int, height: int) -> tuple[int, int]:
    """Return the width and height that a picture is scaled down to before it is looked at."""
    ratio = max(width, height) / LARGEST_SIDE
    if ratio <= 1:
        return width, height
    return math.ceil(width / ratio), math.ceil(height / ratio)


class Upsampler:
    """What both have in common.

    Attributes:
        name: of its folder.
        network: a causal language model of transformers; runs where its weights are.
        describes: it makes a prompt of a picture, not of a prompt.
    """

    describes = False

    def __init__(
        self, name: str, network: Any, tokenizer: Any, ends: Sequence[int], drawing: Drawing
    ) -> None:
        self.name = name
        self.network: nn.Module = network
        self.tokenizer = tokenizer
        self.ends = tuple(ends)
        self.drawing = drawing

    def _ask(self, message: str) -> str:
        """Return a message as one turn of a conversation."""
        turn = [{"role": "user", "content": message}]
        asked = self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        return str(asked)

    def _answer(self, questions: Sequence[str], seed: int, **pixels: Tensor) -> list[str]:
        """Return what is drawn behind each question; the end is not part of it."""
        from transformers import GenerationConfig

        ids = [self.tokenizer(q, add_special_tokens=False)["input_ids"] for q in questions]
        longest = max(map(len, ids))
        room = min(self.drawing.longest, self.drawing.room - longest)
        if room < 1:
            raise Error(
                f"the prompt has {longest} tokens, but {self.name} has room for "
                f"{self.drawing.room - 1}; disable_prompt_upsampler takes it as it is"
            )
        device = next(self.network.parameters()).device
        # filled in front, so that all answers begin at one place
        tokens = torch.tensor([[self.ends[0]] * (longest - len(one)) + one for one in ids])
        mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in ids])
        settings = GenerationConfig(
            do_sample=True,
            temperature=self.drawing.temperature,
            top_p=self.drawing.top_p,
            top_k=0,
            max_new_tokens=room,
            eos_token_id=list(self.ends),
            pad_token_id=self.ends[0],
            bos_token_id=None,
        )
        network: Any = self.network
        with torch.inference_mode(), _seeded(seed, device):
            drawn = network.generate(
                input_ids=tokens.to(device),
                attention_mask=mask.to(device),
                generation_config=settings,
                **pixels,
            )
        return [self._text(row) for row in drawn[:, longest:].tolist()]

    def _text(self, ids: list[int]) -> str:
        end = next((place for place, token in enumerate(ids) if token in self.ends), len(ids))
        return str(self.tokenizer.decode(ids[:end], skip_special_tokens=False))


class TextUpsampler(Upsampler):
    """Makes long prompts of short ones, for Text2World."""

    def lengthen(self, prompts: Sequence[str], seed: int = 0) -> list[str]:
        """Return long prompts, drawn together.

        Raises:
            Error: a prompt leaves no room, or nothing is left of an answer.
        """
        asked = [self._ask(f"{LENGTHEN}{prompt}") for prompt in prompts]
        found = [clean(answer) for answer in self._answer(asked, seed)]
        return _whole(found, self.name)


class ImageUpsampler(Upsampler):
    """Makes prompts of pictures, for Video2World."""

    describes = True

    def __init__(
        self,
        name: str,
        network: Any,
        tokenizer: Any,
        ends: Sequence[int],
        drawing: Drawing,
        mean: Sequence[float] = _MEAN,
        std: Sequence[float] = _STD,
    ) -> None:
        super().__init__(name, network, tokenizer, ends, drawing)
        self.mean = torch.tensor(mean).view(3, 1, 1)
        self.std = torch.tensor(std).view(3, 1, 1)
        self.patch = int(network.config.vision_config.patch_size)

    def describe(self, frame: NDArray[np.uint8], seed: int = 0) -> str:
        """Return a prompt for a picture uint8 (H, W, 3).

        Raises:
            Error: the answer is empty.
        """
        picture = Image.fromarray(frame)
        size = shrunk(*picture.size)
        if size != picture.size:
            picture = picture.resize(size)
        columns, rows = (-(-side // self.patch) for side in size)
        fitting = (columns * self.patch, rows * self.patch)
        if fitting != picture.size:
            picture = picture.resize(fitting, Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1) / 255
        parameter = next(self.network.parameters())
        seen = ROW_END.join([IMAGE * columns] * rows) + IMAGE_END
        question = self._ask(f"{IMAGE}\n{DESCRIBE}").replace(IMAGE, seen, 1)
        (answer,) = self._answer(
            [question],
            seed,
            pixel_values=((pixels - self.mean) / self.std)[None].to(parameter),
            image_sizes=torch.tensor([[pixels.shape[1], pixels.shape[2]]]).to(parameter.device),
        )
        return _whole([answer.strip()], self.name)[0]


def _whole(answers: list[str], name: str) -> list[str]:
    if not all(answers):
        raise Error(f"{name} wrote nothing; disable_prompt_upsampler takes prompts as they are")
    return answers


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draw by a seed inside; what others draw is not changed."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


# --- files

_BLOCK = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_SEEING = {
    "attention.wq": "attention.q_proj",
    "attention.wk": "attention.k_proj",
    "attention.wv": "attention.v_proj",
    "attention.wo": "attention.o_proj",
    "feed_forward.w1": "feed_forward.gate_proj",
    "feed_forward.w2": "feed_forward.down_proj",
    "feed_forward.w3": "feed_forward.up_proj",
    "attention_norm": "attention_norm",
    "ffn_norm": "ffn_norm",
}
_DROPPED = {
    "*_extra_state": "FP8 bookkeeping of Transformer Engine",
    "*rope.*_cached": "rotary table, computed here",
}


def _language(own: str) -> dict[str, str]:
    return {
        "tok_embeddings.weight": f"{own}embed_tokens.weight",
        "norm.weight": f"{own}norm.weight",
        "output.weight": "lm_head.weight",
        **{
            f"layers.{{i}}.{theirs}.weight": f"{own}layers.{{i}}.{ours}.weight"
            for theirs, ours in _BLOCK.items()
        },
    }


TEXT_KEYS = KeyMap(_language("model."), _DROPPED, ("model.", ""))
IMAGE_KEYS = KeyMap(
    {
        **_language("model.language_model."),
        **{
            f"mm_projector.projector.{place}.{leaf}": f"model.multi_modal_projector.{ours}.{leaf}"
            for place, ours in ((0, "linear_1"), (2, "linear_2"))
            for leaf in ("weight", "bias")
        },
        **{
            f"vision_encoder.{name}.weight": f"model.vision_tower.{name}.weight"
            for name in ("patch_conv", "ln_pre")
        },
        **{
            f"vision_encoder.transformer.layers.{{i}}.{theirs}.weight": (
                f"model.vision_tower.transformer.layers.{{i}}.{ours}.weight"
            )
            for theirs, ours in _SEEING.items()
        },
    },
    _DROPPED,
    ("model.", ""),
)


def load_upsampler(
    folder: Path,
    *,
    describes: bool,
    device: torch.device | str,
    dtype: torch.dtype = torch.bfloat16,
    tokenizer_folder: Path | None = None,
) -> Upsampler:
    """Load a prompt upsampler; nothing in its folder is executed.

    Args:
        folder: with NVIDIA's model.pt, or the safetensors and config.json of transformers; and the
            files of the tokenizer.
        describes: it is the one for Video2World.
        device: where it goes.
        dtype: of its weights.
        tokenizer_folder: where the tokenizer is, if not in `folder`.

    Raises:
        CheckpointError: a file is absent or does not fit.
    """
    from transformers import AutoModelForCausalLM, LlavaForConditionalGeneration

    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder}")
    released = folder / "model.pt"
    if released.is_file():
        source = open_checkpoint(released)
        settings = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
        network = _build(source, settings, describes, dtype)
    elif any(folder.glob("*.safetensors")):
        kind: Any = LlavaForConditionalGeneration if describes else AutoModelForCausalLM
        network = pretrained(kind, folder, dtype)
    else:
        raise CheckpointError(f"{folder} holds no model.pt or safetensors{unfinished(folder)}")
    place = tokenizer_folder or folder
    tokenizer = pretrained_tokenizer(place)
    end = tokenizer.eos_token_id
    if end is None:
        raise CheckpointError(f"{place} does not say which token ends an answer")
    network.generation_config = type(network.generation_config)()
    network.to(device)
    if not describes:
        return TextUpsampler(folder.name, network, tokenizer, [end], OF_TEXT)
    marks = [tokenizer.convert_tokens_to_ids(mark) for mark in (IMAGE, ROW_END, IMAGE_END)]
    if len({*marks, tokenizer.unk_token_id}) < 4:
        raise CheckpointError(f"{place} knows no {IMAGE}, {ROW_END} or {IMAGE_END}")
    network.config.image_token_id = marks[0]
    mean, std = _colours(place)
    return ImageUpsampler(folder.name, network, tokenizer, [end], OF_IMAGE, mean, std)


def _colours(folder: Path) -> tuple[Sequence[float], Sequence[float]]:
    path = folder / "preprocessor_config.json"
    settings = read_json(path) if path.is_file() else {}
    found = (settings.get("image_mean", _MEAN), settings.get("image_std", _STD))
    if any(len(each) != 3 for each in found):
        raise CheckpointError(f"{path}: image_mean and image_std must be of 3 colours")
    return found


def _build(
    source: Checkpoint, settings: Mapping[str, Any], describes: bool, dtype: torch.dtype
) -> Any:
    """Return the network of a model.pt; what neither it nor config.json says is as released."""
    from transformers import (
        LlavaConfig,
        LlavaForConditionalGeneration,
        MistralConfig,
        MistralForCausalLM,
        PixtralVisionConfig,
    )

    keys = IMAGE_KEYS if describes else TEXT_KEYS
    shapes = {
        ours: info.shape
        for name, info in source.tensors.items()
        if (ours := keys.ours(name)) is not None
    }
    own = "model.language_model." if describes else "model."
    head = int(settings.get("head_dim") or 128)
    try:
        vocabulary, width = shapes[f"{own}embed_tokens.weight"]
        first = f"{own}layers.0."
        text = MistralConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=shapes[f"{first}mlp.gate_proj.weight"][0],
            num_hidden_layers=_count(shapes, f"{own}layers."),
            num_attention_heads=shapes[f"{first}self_attn.q_proj.weight"][0] // head,
            num_key_value_heads=shapes[f"{first}self_attn.k_proj.weight"][0] // head,
            head_dim=head,
            rms_norm_eps=settings.get("norm_eps") or 1e-5,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": settings.get("rope_theta") or (1e9 if describes else 1e6),
            },
            sliding_window=None,
            max_position_embeddings=(OF_IMAGE if describes else OF_TEXT).room,
            tie_word_embeddings=False,
        )
        if not describes:
            config: Any = text
        else:
            seeing = dict(settings.get("vision_encoder") or {})
            tower = "model.vision_tower."
            patch = shapes[f"{tower}patch_conv.weight"]
            inner = f"{tower}transformer.layers."
            config = LlavaConfig(
                text_config=text,
                vision_config=PixtralVisionConfig(
                    hidden_size=patch[0],
                    num_channels=patch[1],
                    patch_size=patch[2],
                    image_size=int(seeing.get("image_size") or LARGEST_SIDE),
                    intermediate_size=shapes[f"{inner}0.feed_forward.gate_proj.weight"][0],
                    num_hidden_layers=_count(shapes, inner),
                    num_attention_heads=int(seeing.get("num_attention_heads") or 16),
                    hidden_act="silu",
                    rope_parameters={
                        "rope_type": "axial",
                        "rope_theta": float(seeing.get("rope_theta") or 1e4),
                    },
                ),
                projector_hidden_act="gelu",
                vision_feature_layer=-1,
                vision_feature_select_strategy="full",
            )
    except (KeyError, IndexError, ValueError) as error:
        raise CheckpointError(f"{source.path} is no prompt upsampler: {error!r}") from error
    with torch.device("meta"):
        network: Any = (LlavaForConditionalGeneration if describes else MistralForCausalLM)(config)
    for name, module in [*network.named_modules()]:
        if name.endswith(("rotary_emb", "patch_positional_embedding")):
            # holds computed tables alone, which no file has
            network.set_submodule(name, type(module)(module.config))
    load_into(network, source, keys, device="cpu", dtype=dtype)
    for name, parameter in network.named_parameters():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            size = head
            if "vision_tower" in name:
                vision = config.vision_config
                size = vision.hidden_size // vision.num_attention_heads
            parameter.data = _in_halves(parameter.data, size)
    return network.requires_grad_(False).eval()


def _count(shapes: Mapping[str, Sequence[int]], prefix: str) -> int:
    numbers = {int(n[len(prefix) :].split(".")[0]) for n in shapes if n.startswith(prefix)}
    return len(numbers)


def _in_halves(weight: Tensor, head: int) -> Tensor:
    """Return rows (heads x size, in) with the neighbours of each pair moved to the two halves."""
    pairs = weight.view(-1, head // 2, 2, weight.shape[1])
    return pairs.transpose(1, 2).reshape(weight.shape).contiguous()
