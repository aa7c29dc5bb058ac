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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from worldline.errors import CheckpointError, Error
from worldline.files import read_json, unfinished
from worldline.weights.checkpoint import open_checkpoint
from worldline.weights.keymap import KeyMap
from worldline.weights.networks import pretrained, pretrained_tokenizer
from worldline.weights.stream import load_into

LENGTHEN = "Expand this short caption of a video into a long caption, in one paragraph: "
DESCRIBE = (
    "Describe this as a video, in at most 150 words: refined, concise, about what is in it alone. "
    "No introduction, no filler, no remarks on style, nothing that is outside of the video."
)
IMAGE, ROW_END, IMAGE_END = "[IMG]", "[IMG_BREAK]", "[IMG_END]"
LARGEST_SIDE = 1024
PIXTRAL = "mistral-community/pixtral-12b"
DESCRIBING = ("Pixtral-12B", PIXTRAL)
LENGTHENING = (
    "Cosmos-UpsamplePrompt1-12B-Text2World",
    "Cosmos-1.0-Prompt-Upsampler-12B-Text2World",
)
# colours of the vision half, where the folder holds no preprocessor_config.json
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


class Upsampler:
    """A language model that makes long prompts of short ones, for Text2World.

    Attributes:
        name: of its folder.
        network: a causal language model of transformers; runs where its weights are.
        describes: whether it makes a prompt of a picture instead.
        room: tokens of question and answer together.
        longest: tokens of an answer.
        top_p: mass of the likely tokens that may be drawn.
    """

    describes = False
    room = 1024
    longest = 512
    top_p = 1.0

    def __init__(self, name: str, network: Any, tokenizer: Any) -> None:
        self.name = name
        self.network: nn.Module = network
        self.tokenizer = tokenizer
        self.end: int = tokenizer.eos_token_id

    def write(self, prompt: str | None, frame: NDArray[np.uint8] | None, seed: int = 0) -> str:
        """The prompt to use in place of that of a request.

        Args:
            prompt: a short one (Text2World).
            frame: the picture (H, W, 3) to describe (Video2World).
            seed: of the draws.

        Raises:
            Error: the prompt leaves no room for an answer, or the answer is empty.
        """
        return self._written(clean(self._answer(self._ask(f"{LENGTHEN}{prompt}"), seed)))

    def _ask(self, message: str) -> Any:
        """A message as one turn of a conversation."""
        turn = [{"role": "user", "content": message}]
        return self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)

    def _answer(self, question: str, seed: int, **pixels: Tensor) -> str:
        """The text that is drawn behind a question, without its end."""
        from transformers import GenerationConfig

        ids = self.tokenizer(question, add_special_tokens=False)["input_ids"]
        room = min(self.longest, self.room - len(ids))
        if room < 1:
            raise Error(
                f"the prompt has {len(ids)} tokens, {self.name} has room for {self.room - 1}; "
                "disable_prompt_upsampler takes it as it is"
            )
        network: Any = self.network
        device = next(network.parameters()).device
        tokens = torch.tensor([ids], device=device)
        settings = GenerationConfig(
            do_sample=True,
            temperature=0.01,  # as released: nearly greedy
            top_p=self.top_p,
            top_k=0,
            max_new_tokens=room,
            eos_token_id=self.end,
            pad_token_id=self.end,
            bos_token_id=None,
        )
        generators = [device] if device.type == "cuda" else []
        # the draws of others are not changed by the seed
        with torch.inference_mode(), torch.random.fork_rng(generators):
            torch.manual_seed(seed)
            drawn = network.generate(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                generation_config=settings,
                **pixels,
            )
        answer = drawn[0, len(ids) :].tolist()
        answer = answer[: answer.index(self.end)] if self.end in answer else answer
        return str(self.tokenizer.decode(answer, skip_special_tokens=False))

    def _written(self, answer: str) -> str:
        if not answer:
            raise Error(f"{self.name} wrote nothing; disable_prompt_upsampler takes prompts as is")
        return answer


class ImageUpsampler(Upsampler):
    """A language model that makes prompts of pictures, for Video2World.

    Attributes:
        mean: colour (3, 1, 1) that the vision half takes for 0.
        std: colours (3, 1, 1) that it takes for 1.
        patch: pixels of a side of one image token.
    """

    describes = True
    room = 4300
    longest = 400
    top_p = 0.9

    def __init__(
        self,
        name: str,
        network: Any,
        tokenizer: Any,
        mean: Sequence[float] = _MEAN,
        std: Sequence[float] = _STD,
    ) -> None:
        super().__init__(name, network, tokenizer)
        self.mean = torch.tensor(mean).view(3, 1, 1)
        self.std = torch.tensor(std).view(3, 1, 1)
        self.patch = int(network.config.vision_config.patch_size)

    def write(self, prompt: str | None, frame: NDArray[np.uint8] | None, seed: int = 0) -> str:
        assert frame is not None  # a request without a prompt has an input
        picture = Image.fromarray(frame)
        if (size := shrunk(*picture.size)) != picture.size:
            picture = picture.resize(size)
        columns, rows = (-(-side // self.patch) for side in size)
        whole = (columns * self.patch, rows * self.patch)
        if whole != picture.size:
            picture = picture.resize(whole, Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1) / 255
        parameter = next(self.network.parameters())
        image_tokens = ROW_END.join([IMAGE * columns] * rows) + IMAGE_END
        answer = self._answer(
            self._ask(f"{IMAGE}\n{DESCRIBE}").replace(IMAGE, image_tokens, 1),
            seed,
            pixel_values=((pixels - self.mean) / self.std)[None].to(parameter),
            image_sizes=torch.tensor([whole[::-1]]).to(parameter.device),
        )
        return self._written(answer.strip())


def clean(text: str) -> str:
    """An answer of the text upsampler as one line without headings and marks."""
    text = re.sub(r"[\n\r]", " ", text)

    def heading(found: re.Match[str]) -> str:
        return "" if len(re.findall(r"\w+", found[1])) < 10 else found[0]

    text = re.sub(r"- \*\*(.*?)\*\*", heading, text)
    for mark in ("Caption:", "#####", "####", "- ", "* ", ","):
        if text.startswith(mark):
            text = text[len(mark) :].lstrip()
    return " ".join(text.split()).strip(" -,*:\"'“”")


def shrunk(width: int, height: int) -> tuple[int, int]:
    """Width and height that a picture is scaled down to, so that no side is above 1024."""
    ratio = max(width, height) / LARGEST_SIDE
    if ratio <= 1:
        return width, height
    return math.ceil(width / ratio), math.ceil(height / ratio)


# --- files

_DROPPED = {
    "*_extra_state": "FP8 bookkeeping of Transformer Engine",
    "*rope.*_cached": "rotary table, computed here",
}
_TOWER = "model.vision_tower."
_VISION_NAMES = {
    **{f"attention.w{leaf}": f"attention.{leaf}_proj" for leaf in "qkvo"},
    "feed_forward.w1": "feed_forward.gate_proj",
    "feed_forward.w2": "feed_forward.down_proj",
    "feed_forward.w3": "feed_forward.up_proj",
    "attention_norm": "attention_norm",
    "ffn_norm": "ffn_norm",
}
_TEXT_NAMES = {
    "attention.": "self_attn.",
    "feed_forward.": "mlp.",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def _layers(theirs: str, ours: str, renamed: Mapping[str, str]) -> dict[str, str]:
    names: dict[str, str] = {}
    for released, name in _VISION_NAMES.items():
        for old, new in renamed.items():
            name = name.replace(old, new)
        names[f"{theirs}layers.{{i}}.{released}.weight"] = f"{ours}layers.{{i}}.{name}.weight"
    return names


def _language(ours: str) -> dict[str, str]:
    return {
        "tok_embeddings.weight": f"{ours}embed_tokens.weight",
        "norm.weight": f"{ours}norm.weight",
        "output.weight": "lm_head.weight",
        **_layers("", ours, _TEXT_NAMES),
    }


_PICTURES = {
    **{
        f"mm_projector.projector.{place}.{leaf}": f"model.multi_modal_projector.{ours}.{leaf}"
        for place, ours in ((0, "linear_1"), (2, "linear_2"))
        for leaf in ("weight", "bias")
    },
    "vision_encoder.patch_conv.weight": f"{_TOWER}patch_conv.weight",
    "vision_encoder.ln_pre.weight": f"{_TOWER}ln_pre.weight",
    **_layers("vision_encoder.transformer.", f"{_TOWER}transformer.", {}),
}
TEXT_KEYS = KeyMap(_language("model."), _DROPPED, ("model.", ""))
IMAGE_KEYS = KeyMap({**_language("model.language_model."), **_PICTURES}, _DROPPED, ("model.", ""))


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
        folder: holds NVIDIA's model.pt, or the safetensors and config.json of transformers; and
            the tokenizer.
        describes: it is the one for Video2World.
        device: where it goes.
        dtype: of its weights.
        tokenizer_folder: holds the tokenizer, if not `folder`: that of `PIXTRAL` for NVIDIA's
            conversion of it.

    Raises:
        CheckpointError: a file is absent or does not fit.
    """
    from transformers import AutoModelForCausalLM, LlavaForConditionalGeneration

    if (folder / "model.pt").is_file():
        network = _read_released(folder, describes, dtype)
    elif any(folder.glob("*.safetensors")):
        kind: Any = LlavaForConditionalGeneration if describes else AutoModelForCausalLM
        network = pretrained(kind, folder, dtype)
    else:
        raise CheckpointError(f"{folder} holds no model.pt or safetensors{unfinished(folder)}")
    place = tokenizer_folder or folder
    tokenizer = pretrained_tokenizer(place)
    if tokenizer.eos_token_id is None:
        raise CheckpointError(f"{place} names no token that ends an answer")
    network.generation_config = type(network.generation_config)()
    network.to(device)
    if not describes:
        return Upsampler(folder.name, network, tokenizer)
    marks = [tokenizer.convert_tokens_to_ids(mark) for mark in (IMAGE, ROW_END, IMAGE_END)]
    if len({*marks, tokenizer.unk_token_id}) < 4:
        raise CheckpointError(f"{place} knows no {IMAGE}, {ROW_END} or {IMAGE_END}")
    network.config.image_token_id = marks[0]
    path = place / "preprocessor_config.json"
    settings = read_json(path) if path.is_file() else {}
    mean, std = settings.get("image_mean", _MEAN), settings.get("image_std", _STD)
    return ImageUpsampler(folder.name, network, tokenizer, mean, std)


def _read_released(folder: Path, describes: bool, dtype: torch.dtype) -> Any:
    """The network of a model.pt; settings that neither it nor config.json has are as released."""
    from transformers import LlavaForConditionalGeneration, MistralForCausalLM

    source = open_checkpoint(folder / "model.pt")
    path = folder / "config.json"
    settings = read_json(path) if path.is_file() else {}
    keys = IMAGE_KEYS if describes else TEXT_KEYS
    shapes = {
        ours: info.shape
        for name, info in source.tensors.items()
        if (ours := keys.ours(name)) is not None
    }
    try:
        config = (_image_config if describes else _text_config)(shapes, settings)
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
            vision = name.startswith(_TOWER)
            part = config.vision_config if vision else config.get_text_config()
            parameter.data = _in_halves(parameter.data, part.head_dim)
    return network.requires_grad_(False).eval()


def _text_config(
    shapes: Mapping[str, Sequence[int]], settings: Mapping[str, Any], ours: str = "model."
) -> Any:
    from transformers import MistralConfig

    describes = ours != "model."
    head = int(settings.get("head_dim") or 128)
    vocabulary, width = shapes[f"{ours}embed_tokens.weight"]
    inner, queries, keys = (
        shapes[f"{ours}layers.0.{name}_proj.weight"][0]
        for name in ("mlp.gate", "self_attn.q", "self_attn.k")
    )
    theta = settings.get("rope_theta") or (1e9 if describes else 1e6)
    return MistralConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=_count(shapes, f"{ours}layers."),
        num_attention_heads=queries // head,
        num_key_value_heads=keys // head,
        head_dim=head,
        rms_norm_eps=settings.get("norm_eps") or 1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        sliding_window=None,
        max_position_embeddings=(ImageUpsampler if describes else Upsampler).room,
        tie_word_embeddings=False,
    )


def _image_config(shapes: Mapping[str, Sequence[int]], settings: Mapping[str, Any]) -> Any:
    from transformers import LlavaConfig, PixtralVisionConfig

    stated = settings.get("vision_encoder") or {}
    width, colours, patch, _ = shapes[f"{_TOWER}patch_conv.weight"]
    layers = f"{_TOWER}transformer.layers."
    theta = float(stated.get("rope_theta") or 1e4)
    vision = PixtralVisionConfig(
        hidden_size=width,
        num_channels=colours,
        patch_size=patch,
        image_size=int(stated.get("image_size") or LARGEST_SIDE),
        intermediate_size=shapes[f"{layers}0.feed_forward.gate_proj.weight"][0],
        num_hidden_layers=_count(shapes, layers),
        num_attention_heads=int(stated.get("num_attention_heads") or 16),
        hidden_act="silu",
        rope_parameters={"rope_type": "axial", "rope_theta": theta},
    )
    return LlavaConfig(
        text_config=_text_config(shapes, settings, "model.language_model."),
        vision_config=vision,
        projector_hidden_act="gelu",
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )


def _count(shapes: Mapping[str, Sequence[int]], prefix: str) -> int:
    return len({n[len(prefix) :].split(".")[0] for n in shapes if n.startswith(prefix)})


def _in_halves(weight: Tensor, head: int) -> Tensor:
    """Rows (heads x size, in) with the neighbours of each pair moved to the two halves."""
    pairs = weight.view(-1, head // 2, 2, weight.shape[1])
    return pairs.transpose(1, 2).reshape(weight.shape).contiguous()
