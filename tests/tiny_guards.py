"""Guardrails and prompt upsamplers with made-up weights, in the released layouts."""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path

import torch
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    PixtralVisionConfig,
    PreTrainedTokenizerFast,
)

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from worldline.guardrails import SIGLIP, language
from worldline.text.upsampler import key_map

from .guardrails.folders import write_blocklist
from .guardrails.networks import write_classifier, write_retinaface, write_siglip
from .guardrails.test_language import ANSWERS, write_adapter, write_model

GUARDRAILS = "nvidia/Cosmos-Guardrail1"
LENGTHENS, DESCRIBES = "Cosmos-UpsamplePrompt1-12B-Text2World", "Pixtral-12B"
SAFE, UNSAFE = "kitten", "dagger"  # last words that the guard model knows
REFUSED_WORD = "zorbash"  # of the blocklist
# what upsamplers answer, whatever they are asked
LONG, CAPTION = f"a very long {SAFE}", f"a picture of a {SAFE}"
HEAD, PATCH = 16, 16
WORDS = 32  # of the networks


def add_guardrails(root: Path, name: str = GUARDRAILS, *, unknown_is_safe: bool = False) -> Path:
    """Add the guardrails of Predict1 and Predict2.5; each frame is safe; their folder.

    Args:
        root: of the checkpoints.
        name: of the folder of blocklist and others.
        unknown_is_safe: the guard models call every prompt safe, not only those they know.
    """
    folder = root / name
    write_blocklist(folder / "blocklist")
    own = folder / "video_content_safety_filter"
    write_classifier(own / "safety_filter.pt")
    write_siglip(own / _cached(SIGLIP))
    write_retinaface(folder / "face_blur_filter" / "Resnet50_Final.pth")
    for kind in (language.LLAMA_GUARD_3, language.QWEN3GUARD):
        answers = {"<unk>": ANSWERS[kind.name][SAFE]} if unknown_is_safe else None
        write_model(root / kind.released, kind, answers)
    return folder


def add_aegis(folder: Path, answer: str) -> None:
    """Add Aegis to a folder of guardrails, as Cosmos 1.0 has it; it gives one answer."""
    aegis = language.AEGIS
    answers = {"[/INST]": answer}
    write_model(folder / "aegis" / _cached(aegis.released), aegis, answers)
    adapter = folder / "aegis" / _cached(aegis.adapter)
    adapter.parent.mkdir(parents=True)
    write_adapter(adapter, 4, lora_alpha=0)


def _cached(repository: str) -> str:
    return f"models--{repository.replace('/', '--')}/snapshots/0123abcd"


def write_tokenizer(folder: Path, answer: str) -> dict[str, int]:
    """Write a tokenizer that knows the words of an answer; return its vocabulary."""
    special = ["<unk>", "</s>", "[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]"]
    # a word may come twice in an answer, but what follows it must not be another
    ids = {word: n for n, word in enumerate([*special, *_steps(answer)])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Sequence([decoders.Replace("_", " "), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(word, normalized=False) for word in special])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>"
    )
    wrapped.chat_template = "[INST]{{ messages[0].content }}[/INST]"
    wrapped.save_pretrained(folder)
    return ids


def _steps(answer: str) -> list[str]:
    """Tokens that follow one another, no two of them alike."""
    words = [f"_{word}" for word in answer.split()]
    whole = ["".join(words[:2]), *words[2:]]
    assert len(set(whole)) == len(whole)
    return whole


def _teach(network: torch.nn.Module, prefix: str, ids: dict[str, int], answer: str) -> None:
    """Make a network whose next token follows from the last alone: the answer, then the end."""
    state = dict(network.named_parameters())
    steps = ["[/INST]", *_steps(answer), "</s>"]
    with torch.no_grad():
        for name, parameter in state.items():
            if name.startswith(prefix) and name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.zero_()  # so that a token is all that the head sees
        state[f"{prefix}embed_tokens.weight"].copy_(torch.eye(WORDS))
        head = state["lm_head.weight"].zero_()
        for word, following in pairwise(steps):
            head[ids[following], ids[word]] = 1


def text_network() -> MistralForCausalLM:
    torch.manual_seed(0)
    return MistralForCausalLM(_text_config())


def image_network(image: int = 4) -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    seeing = PixtralVisionConfig(
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        patch_size=PATCH,
        image_size=1024,
        hidden_act="silu",
        rope_parameters={"rope_type": "axial", "rope_theta": 1e4},
    )
    config = LlavaConfig(
        text_config=_text_config(1e9),
        vision_config=seeing,
        image_token_id=image,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return LlavaForConditionalGeneration(config)


def _text_config(theta: float = 1e6) -> MistralConfig:
    return MistralConfig(
        vocab_size=WORDS,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=HEAD,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        sliding_window=None,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=1,
    )


def save_released(network: torch.nn.Module, folder: Path) -> Path:
    """Write a network as model.pt, in NVIDIA's names and order of rows."""
    folder.mkdir(parents=True, exist_ok=True)
    keys = key_map(network)
    state = {}
    for name, parameter in network.named_parameters():
        released = keys.released(name, prefix="")
        tensor = parameter.detach()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            # from halves to neighbours
            halves = tensor.view(-1, 2, HEAD // 2, tensor.shape[1])
            tensor = halves.transpose(1, 2).reshape(tensor.shape)
        of_language = not released.startswith(("mm_projector", "vision_encoder"))
        state[f"model.{released}" if of_language else released] = tensor.clone()
    torch.save({"model": state}, folder / "model.pt")
    return folder


def add_upsampler(root: Path, *, describes: bool, released: bool = False, answer: str = "") -> Path:
    """Add a prompt upsampler that gives one answer to everything; its folder."""
    folder = root / (DESCRIBES if describes else LENGTHENS)
    answer = answer or (CAPTION if describes else LONG)
    shutil.rmtree(folder, ignore_errors=True)
    ids = write_tokenizer(folder, answer)
    network = image_network() if describes else text_network()
    _teach(network, "model.language_model." if describes else "model.", ids, answer)
    if released:
        save_released(network, folder)
    else:
        network.save_pretrained(folder)
    return folder
