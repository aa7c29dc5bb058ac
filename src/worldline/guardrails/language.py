"""Guardrails that are language models: Aegis, Llama Guard 3, Qwen3Guard.

The networks are transformers'. Answers are decoded greedily: sampling, as in the checkpoints' own
settings, would make a refusal a matter of luck.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from worldline.errors import CheckpointError
from worldline.files import read_json
from worldline.guardrails.base import Verdict
from worldline.weights.checkpoint import open_checkpoint
from worldline.weights.networks import pretrained, pretrained_tokenizer

# the descriptions are this project's own words for the topics that the model was trained on
_AEGIS = (
    ("violence", "O1", "Violence", "harming people or animals, praising or planning such harm."),
    ("sexual", "O2", "Sexual", "sexual acts or bodies, meant to arouse, among adults."),
    (
        "criminal_planning",
        "O3",
        "Criminal Planning/Confessions",
        "preparing a crime, helping with one, or owning up to one.",
    ),
    ("weapons", "O4", "Guns and Illegal Weapons", "getting, making or using arms against the law."),
    (
        "substance_abuse",
        "O5",
        "Controlled/Regulated Substances",
        "making, selling, getting or misusing drugs, alcohol or tobacco.",
    ),
    ("suicide", "O6", "Suicide and Self Harm", "ending or hurting oneself, or urging others to."),
    ("sexual_minor", "O7", "Sexual (minor)", "anything sexual in which a child takes part."),
    (
        "hatred",
        "O8",
        "Hate/Identity Hate",
        "demeaning people for origin, faith, sex, orientation, disability or the like.",
    ),
    ("harassment", "O10", "Harassment", "bullying, stalking or humiliating a person."),
    ("threat", "O11", "Threat", "announcing harm to a person or to what is theirs."),
    ("profanity", "O12", "Profanity", "swearing and obscene language."),
)
_AEGIS_TASK = (
    "Task: Assess whether the 'User' messages of the conversation below hold unsafe content, "
    "by the policy of the categories listed here."
)
_AEGIS_ANSWER = (
    "Give your safety assessment of 'User' above:\n"
    "- The first line must read 'safe' or 'unsafe'.\n"
    "- If unsafe, a second line must list the violated categories, separated by commas."
)

_LLAMA_GUARD_3 = {
    "S1": "Violent Crimes.",
    "S2": "Non-Violent Crimes.",
    "S3": "Sex Crimes.",
    "S4": "Child Exploitation.",
    "S5": "Defamation.",
    "S6": "Specialized Advice.",
    "S7": "Privacy.",
    "S8": "Intellectual Property.",
    "S9": "Indiscriminate Weapons.",
    "S10": "Hate.",
    "S11": "Self-Harm.",
    "S12": "Sexual Content.",
    "S13": "Elections.",
    "s14": "Code Interpreter Abuse.",  # lower case, as upstream
}

# categories that are reported; personal data, politics and copyright refuse too
_QWEN3GUARD = re.compile(
    "Violent|Non-violent Illegal Acts|Sexual Content or Sexual Acts|Suicide & Self-Harm"
    "|Unethical Acts|Jailbreak"
)
_QWEN3GUARD_SAFETY = re.compile(r"Safety: (Safe|Unsafe|Controversial)")
# how a safe answer begins; the released code accepts every answer without "unsafe"
_SAFE = re.compile(r"\s*safe\b|.*Safety: (?:Safe|Controversial)\b", re.DOTALL | re.IGNORECASE)


def decide_aegis(answer: str) -> Verdict:
    """Verdict of an answer of Aegis: "safe", or "unsafe" and a line such as "O3"."""
    if "unsafe" not in answer.lower():
        return Verdict(True)
    # There is no O9, and the released code counts on: O10 to O12 are reported one place late.
    try:
        place = int(answer.split("\n")[1].lstrip("O")) - 1
    except (IndexError, ValueError):
        place = -1
    return Verdict(False, "", (_AEGIS[place][0],) if 0 <= place < len(_AEGIS) else ())


def decide_llama_guard_3(answer: str) -> Verdict:
    """Verdict of an answer of Llama Guard 3: "safe", or "unsafe" and lines such as "S1,S10"."""
    if "unsafe" not in answer.lower():
        return Verdict(True)
    codes = re.split(r"[,\n]", answer.replace("<|eot_id|>", ""))[1:]
    names = (_LLAMA_GUARD_3.get(code.strip(), "") for code in codes)
    return Verdict(False, "", tuple(name.removesuffix(".") for name in names if name))


def decide_qwen3guard(answer: str) -> Verdict:
    """Verdict of an answer of Qwen3Guard; an answer without one is refused."""
    safety = _QWEN3GUARD_SAFETY.search(answer)
    if safety is None:
        return Verdict(False, "unreadable")
    if safety[1] != "Unsafe":
        return Verdict(True)
    return Verdict(False, "", tuple(_QWEN3GUARD.findall(answer)))


def aegis_prompt(text: str) -> str:
    """Question to Aegis about a prompt."""
    policy = "\n".join(f"{code}: {title}.\nShould not: {what}" for _, code, title, what in _AEGIS)
    return (
        f"[INST] {_AEGIS_TASK}\n\n"
        f"<BEGIN UNSAFE CONTENT CATEGORIES>\n{policy}\n<END UNSAFE CONTENT CATEGORIES>\n\n"
        f"<BEGIN CONVERSATION>\n\nUser: {text}\n\n<END CONVERSATION>\n\n{_AEGIS_ANSWER} [/INST]"
    )


@dataclass(frozen=True)
class GuardModel:
    """A guard model.

    Attributes:
        name: in reports and messages.
        released: repository.
        question: prompt -> text that the model answers, or the user's turn of a conversation.
        decide: answer -> verdict.
        chat: variables of the tokenizer's chat template; None where it is not used.
        max_tokens: length of an answer.
        adapter: repository of low-rank weights that are added; "" if there are none.
    """

    name: str
    released: str
    question: Callable[[str], Any]
    decide: Callable[[str], Verdict]
    chat: Mapping[str, Any] | None
    max_tokens: int = 100
    adapter: str = ""


AEGIS = GuardModel(
    "aegis",
    "meta-llama/LlamaGuard-7b",
    aegis_prompt,
    decide_aegis,
    chat=None,
    adapter="nvidia/Aegis-AI-Content-Safety-LlamaGuard-Defensive-1.0",
)
LLAMA_GUARD_3 = GuardModel(
    "llama_guard_3",
    "meta-llama/Llama-Guard-3-8B",
    lambda text: [{"type": "text", "text": text}],
    decide_llama_guard_3,
    chat={"categories": _LLAMA_GUARD_3},
)
QWEN3GUARD = GuardModel(
    "qwen3guard", "Qwen/Qwen3Guard-Gen-0.6B", str, decide_qwen3guard, chat={}, max_tokens=128
)


class LanguageGuard:
    """A text guardrail that asks a causal language model of transformers.

    Attributes:
        ends: ids of tokens that end an answer.
        max_length: largest number of tokens in a question; longer ones are refused.
    """

    def __init__(self, model: GuardModel, network: Any, tokenizer: Any, ends: set[int]) -> None:
        self.name = model.name
        self.model = model
        self.network: nn.Module = network
        self.networks = (network,)
        self.tokenizer = tokenizer
        self.ends = ends
        self.max_length: int = network.config.max_position_embeddings

    def check(self, text: str) -> Verdict:
        ids = self.tokens(text)
        if len(ids) > self.max_length:
            return Verdict(False, "too long")
        answer = self._answer(ids)
        verdict = self.model.decide(answer)
        if verdict.safe and not _SAFE.match(answer):
            return Verdict(False, "unreadable")
        return verdict

    def tokens(self, text: str) -> list[int]:
        """Token ids of the question about a prompt."""
        # The tokenizer's own marks are broken up: a prompt could else end its turn and answer.
        for mark in self.tokenizer.get_added_vocab():
            if len(mark) > 1:
                text = text.replace(mark, f"{mark[0]} {mark[1:]}")
        question = self.model.question(text)
        if self.model.chat is not None:
            turns = [{"role": "user", "content": question}]
            question = self.tokenizer.apply_chat_template(turns, tokenize=False, **self.model.chat)
        return self.tokenizer(question, add_special_tokens=False)["input_ids"]

    @torch.inference_mode()
    def _answer(self, ids: list[int]) -> str:
        """Greedy answer without special tokens; "", which is refused, if logits are not finite."""
        tokens = torch.tensor([ids], device=next(self.network.parameters()).device)
        answer: list[int] = []
        cache = None
        while len(answer) < self.model.max_tokens:
            output = self.network(
                input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1
            )
            cache = output.past_key_values
            logits: Tensor = output.logits[0, -1]
            if not logits.isfinite().all():
                return ""
            token = int(logits.argmax())
            if token in self.ends:
                break
            answer.append(token)
            tokens = tokens.new_tensor([[token]])
        return self.tokenizer.decode(answer, skip_special_tokens=True)


def load(
    model: GuardModel,
    folder: Path,
    device: torch.device | str,
    dtype: torch.dtype = torch.bfloat16,
    adapter: Path | None = None,
) -> LanguageGuard:
    """Guard model of a folder as released, with its adapter; nothing in them is executed."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if model.adapter and adapter is None:
        raise CheckpointError(f"{model.name} needs the folder of {model.adapter}")
    network = pretrained(AutoModelForCausalLM, folder, dtype)
    tokenizer = pretrained_tokenizer(folder, chat=model.chat is not None)
    ends: set[int] = set()
    for settings in (network.generation_config, AutoConfig.from_pretrained(folder), tokenizer):
        end = getattr(settings, "eos_token_id", None)
        ends |= {end} if isinstance(end, int) else set(end or ())
    if not ends:
        raise CheckpointError(f"{folder} names no token that ends an answer")
    if adapter is not None:
        merge_adapter(network, adapter)
    return LanguageGuard(model, network.to(device), tokenizer, ends)


_ADAPTER_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.(?:default\.)?weight")
_UNSUPPORTED = ("use_dora", "use_rslora", "fan_in_fan_out", "modules_to_save", "rank_pattern")


@torch.no_grad()
def merge_adapter(network: nn.Module, folder: Path) -> None:
    """Add the low-rank weights of a PEFT folder to `network`: W + (alpha / rank) B A."""
    settings = read_json(folder / "adapter_config.json")
    try:
        scale = float(settings["lora_alpha"]) / int(settings["r"])
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"{folder}/adapter_config.json: {error!r}") from error
    unsupported = [name for name in _UNSUPPORTED if settings.get(name)]
    if settings.get("bias", "none") != "none":
        unsupported.append("bias")
    if unsupported:
        raise CheckpointError(f"{folder}/adapter_config.json: unsupported {unsupported}")
    files = [folder / f"adapter_model.{suffix}" for suffix in ("safetensors", "bin")]
    path = next((file for file in files if file.is_file()), files[0])
    checkpoint = open_checkpoint(path)
    halves: dict[str, dict[str, str]] = {}
    for name in checkpoint.entries:
        match = _ADAPTER_KEY.fullmatch(name)
        if match is None:
            raise CheckpointError(f"{path}: {name} is no low-rank weight")
        halves.setdefault(match[1], {})[match[2]] = name
    modules = dict(network.named_modules())
    for name, pair in halves.items():
        layer = modules.get(name)
        if not isinstance(layer, nn.Linear) or pair.keys() != {"A", "B"}:
            raise CheckpointError(f"{path} does not fit the model at {name}")
        down, up = (checkpoint.read(pair[half]).float() for half in "AB")
        out_features, in_features = layer.weight.shape
        rank = int(settings["r"])
        if (*up.shape, *down.shape) != (out_features, rank, rank, in_features):
            raise CheckpointError(f"{path} has other shapes than the model at {name}")
        # the sum in float32, as upstream, which casts afterwards
        layer.weight.copy_(layer.weight.float() + scale * (up @ down))
