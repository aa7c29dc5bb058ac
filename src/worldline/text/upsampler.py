"""Prompt upsamplers: a short prompt into a long one, or a picture into a prompt.

Source: nvidia-cosmos/cosmos-predict1 `diffusion/prompt_upsampler/` and, before it, NVIDIA/Cosmos
`cosmos1/models/diffusion/prompt_upsampler/`. The networks are those of transformers: Mistral-NeMo,
and Pixtral as Llava. Released files pair neighbouring numbers where they rotate, and transformers
the halves of a head: rows of queries and keys change places when such a file is read.

The released code asks in words of its own; these here are the project's.
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from worldline.errors import CheckpointError, Error, option
from worldline.finite import check_finite
from worldline.parallel.offload import BlockPlan, Offloadable
from worldline.repositories import find_repository, unfinished
from worldline.video.read import Frames
from worldline.weights.checkpoint import open_checkpoint, take_network
from worldline.weights.keymap import KeyMap, renamed_by
from worldline.weights.networks import mark_breaker, pretrained, pretrained_tokenizer
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


# colours as CLIP takes them
MEAN = torch.tensor((0.48145466, 0.4578275, 0.40821073))
STD = torch.tensor((0.26862954, 0.26130258, 0.27577711))


class Upsampler:
    """A language model that makes long prompts of short ones (Text2World), or of pictures.

    Offloaded, it moves whole where the device has room for it: streamed, each of the hundreds of
    tokens that it writes takes the time of a copy of all, half a second of 12B at 50 GB/s.

    Attributes:
        name: of its folder.
        part: a causal language model of transformers.
        words: a prompt -> the same without marks that would end its turn.
        describes: it takes pictures (Video2World).
        room: tokens of question and answer together.
        longest: tokens of an answer.
    """

    def __init__(
        self,
        folder: Path,
        roots: Sequence[Path],
        describes: bool,
        device: torch.device,
        *,
        offload: bool = False,
    ) -> None:
        """Read the model of a folder; nothing is executed.

        The folder holds NVIDIA's model.pt, or the safetensors and config.json of transformers; and
        the tokenizer, which NVIDIA's conversion of `PIXTRAL` lacks: its own is found by `roots`.

        Raises:
            CheckpointError: a file is absent or does not fit.
        """
        from transformers import (
            GenerationConfig,
            LlavaForConditionalGeneration,
            MistralForCausalLM,
        )

        kind: Any = LlavaForConditionalGeneration if describes else MistralForCausalLM
        if (folder / "model.pt").is_file():
            network = _read_released(kind, folder, describes)
        elif any(folder.glob("*.safetensors")):
            network = pretrained(kind, folder, torch.bfloat16)
        else:
            raise CheckpointError(f"{folder} holds no model.pt or safetensors{unfinished(folder)}")
        self.name = folder.name
        if describes and not any(folder.glob("tokenizer*.json")):
            folder = find_repository(PIXTRAL, roots)
        self.tokenizer = pretrained_tokenizer(folder)
        if describes:
            marks = self.tokenizer.convert_tokens_to_ids([IMAGE, ROW_END, IMAGE_END])
            if len({*marks, self.tokenizer.unk_token_id}) < 4:
                raise CheckpointError(f"{folder} knows no {IMAGE}, {ROW_END} or {IMAGE_END}")
            network.config.image_token_id = marks[0]
        self.words = mark_breaker(self.tokenizer, self._question, folder)
        self.describes = describes
        self.room, self.longest, top_p = (4300, 400, 0.9) if describes else (1024, 512, 1.0)
        self.end: int = self.tokenizer.eos_token_id
        network.generation_config = GenerationConfig(
            do_sample=True,
            temperature=0.01,  # as released: nearly greedy
            top_p=top_p,
            top_k=0,
            eos_token_id=self.end,
            pad_token_id=self.end,
        )
        self.part: Offloadable[Any] = Offloadable(
            network if offload else network.to(device),
            device,
            offload=offload,
            blocks=BlockPlan("model.language_model.layers" if describes else "model.layers"),
            prefer_whole=True,
        )

    def write(self, prompt: str | None, frame: Frames | None, seed: int = 0) -> str:
        """The prompt to use in place of that of a request.

        Args:
            prompt: a short one (Text2World).
            frame: the picture (H, W, 3) to describe (Video2World).
            seed: of the draws.

        Raises:
            Error: the prompt leaves no room for an answer, or the answer is empty.
        """
        message, picture = f"{LENGTHEN}{self.words(prompt or '')}", dict[str, Tensor]()
        if self.describes:
            assert frame is not None  # a request without a prompt has an input
            message, picture = self._look(frame)
        question = self._question(message)
        with self.part.on_device():
            answer = self._answer(question, seed, **picture)
        answer = answer.strip() if self.describes else clean(answer)
        if not answer:
            without = option("disable_prompt_upsampler", True)
            raise Error(f"{self.name} wrote nothing; {without} takes prompts as they are")
        return answer

    def _question(self, message: str) -> str:
        turn = [{"role": "user", "content": message}]
        template = self.tokenizer.apply_chat_template
        return str(template(turn, tokenize=False, add_generation_prompt=True))

    def _look(self, frame: Frames) -> tuple[str, dict[str, Tensor]]:
        """The question about a picture, and the picture as the network takes it."""
        network = self.part.module
        patch = network.config.vision_config.patch_size
        picture = Image.fromarray(frame)
        picture = picture.resize(shrunk(*picture.size))
        columns, rows = (-(-side // patch) for side in picture.size)
        picture = picture.resize((columns * patch, rows * patch), Image.Resampling.BICUBIC)
        pixels = (torch.from_numpy(np.array(picture)) / 255 - MEAN) / STD
        return f"{ROW_END.join([IMAGE * columns] * rows)}{IMAGE_END}\n{DESCRIBE}", {
            "pixel_values": pixels.permute(2, 0, 1)[None].to(self.part.device, network.dtype),
            "image_sizes": torch.tensor([pixels.shape[:2]], device=self.part.device),
        }

    def _answer(self, question: str, seed: int, **picture: Tensor) -> str:
        """The text that is drawn behind a question, without its end."""
        ids = self.tokenizer(question, add_special_tokens=False)["input_ids"]
        room = min(self.longest, self.room - len(ids))
        if room < 1:
            raise Error(
                f"the prompt has {len(ids)} tokens, {self.name} has room for {self.room - 1}; "
                f"{option('disable_prompt_upsampler', True)} takes it as it is"
            )

        def check(_: Tensor, scores: Tensor) -> Tensor:
            # the largest: what top_p leaves out is minus infinity
            check_finite(scores.amax(-1), "upsample: logits", self.part.module.dtype)
            return scores

        device = self.part.device
        tokens = torch.tensor([ids], device=device)
        forked = torch.random.fork_rng([device] if device.type == "cuda" else [])
        with torch.inference_mode(), forked:  # the draws of others are not changed by the seed
            torch.manual_seed(seed)
            drawn = self.part.module.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=room,
                logits_processor=[check],
                **picture,
            )
        answer = drawn[0, len(ids) :]
        return str(self.tokenizer.decode(answer[answer != self.end], skip_special_tokens=False))


def clean(text: str) -> str:
    """An answer of the text upsampler as one line without headings and marks."""
    text = re.sub(r"[\n\r]", " ", text)
    text = re.sub(
        r"- \*\*(.*?)\*\*", lambda m: m[0] if len(re.findall(r"\w+", m[1])) > 9 else "", text
    )
    for mark in ("Caption:", "#####", "####", "- ", "* ", ","):
        if text.startswith(mark):
            text = text[len(mark) :].lstrip()
    return " ".join(text.split()).strip(" -,*:\"'“”")


def shrunk(width: int, height: int) -> tuple[int, int]:
    """Width and height that a picture is scaled down to, so that no side is above 1024."""
    ratio = max(width, height, LARGEST_SIDE) / LARGEST_SIDE
    return math.ceil(width / ratio), math.ceil(height / ratio)


# --- files

_DROPPED = {
    "*_extra_state": "FP8 bookkeeping of Transformer Engine",
    "*rope.*_cached": "rotary table, computed here",
}
# of transformers -> of the file, for text and vision
_RELEASED = {
    r"^model\.(language_model\.)?(layers|norm)": r"\2",
    r"^model\.(language_model\.)?embed_tokens": "tok_embeddings",
    r"^lm_head": "output",
    r"^model\.vision_tower": "vision_encoder",
    r"^model\.multi_modal_projector\.linear_1": "mm_projector.projector.0",
    r"^model\.multi_modal_projector\.linear_2": "mm_projector.projector.2",
    r"(self_attn|attention)\.(.)_proj": r"attention.w\2",
    r"(mlp|feed_forward)\.gate_proj": "feed_forward.w1",
    r"(mlp|feed_forward)\.down_proj": "feed_forward.w2",
    r"(mlp|feed_forward)\.up_proj": "feed_forward.w3",
    r"input_layernorm": "attention_norm",
    r"post_attention_layernorm": "ffn_norm",
}


def key_map(network: nn.Module) -> KeyMap:
    """Names of a model.pt, some of which have the first "model."."""
    names = {renamed_by(_RELEASED, name): name for name in network.state_dict()}
    return KeyMap(names, _DROPPED, ("model.", ""), bare=("vision_encoder.*", "mm_projector.*"))


def _read_released(kind: Any, folder: Path, describes: bool) -> Any:
    """The network of a model.pt."""
    with torch.device("meta"):
        network = kind(released_config(describes))
    for name, module in [*network.named_modules()]:
        if name.endswith(("rotary_emb", "patch_positional_embedding")):
            # holds computed tables alone, which no file has
            network.set_submodule(name, type(module)(module.config))
    keys = key_map(network)
    source = take_network(open_checkpoint(folder / "model.pt"), (keys.anchor,), keys.prefixes)
    load_into(network, source, keys, device="cpu", dtype=torch.bfloat16)
    for module in network.modules():
        if hasattr(module, "q_proj"):
            for weight in (module.q_proj.weight, module.k_proj.weight):
                weight.data = _in_halves(weight.data, module.head_dim)
    return network.requires_grad_(False).eval()


def released_config(describes: bool) -> Any:
    """Configuration of Pixtral 12B, or of Mistral-NeMo 12B."""
    from transformers import LlavaConfig, MistralConfig, PixtralVisionConfig

    text = MistralConfig(
        vocab_size=131072,
        hidden_size=5120,
        num_hidden_layers=40,
        head_dim=128,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e9 if describes else 1e6},
        sliding_window=None,
    )
    if not describes:
        return text
    return LlavaConfig(
        text_config=text,
        vision_config=PixtralVisionConfig(hidden_act="silu"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )


def _in_halves(weight: Tensor, head: int) -> Tensor:
    """Rows (heads x size, in) with the neighbours of each pair moved to the two halves."""
    pairs = weight.view(-1, head // 2, 2, weight.shape[1])
    return pairs.transpose(1, 2).reshape(weight.shape).contiguous()
