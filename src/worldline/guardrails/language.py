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
from torch import nn

from worldline.errors import CheckpointError
from worldline.files import read_json
from worldline.guardrails.base import Verdict
from worldline.weights.checkpoint import open_checkpoint
from worldline.weights.networks import pretrained, pretrained_tokenizer

# the descriptions are this project's own words for the topics that the model was trained on
_AEGIS = {  # name in reports -> title and description; O1 to O12 in this order, but no O9
    "violence": ("Violence", "harming people or animals, praising or planning such harm."),
    "sexual": ("Sexual", "sexual acts or bodies, meant to arouse, among adults."),
    "criminal_planning": (
        "Criminal Planning/Confessions",
        "preparing a crime, helping with one, or owning up to one.",
    ),
    "weapons": ("Guns and Illegal Weapons", "getting, making or using arms against the law."),
    "substance_abuse": (
        "Controlled/Regulated Substances",
        "making, selling, getting or misusing drugs, alcohol or tobacco.",
    ),
    "suicide": ("Suicide and Self Harm", "ending or hurting oneself, or urging others to."),
    "sexual_minor": ("Sexual (minor)", "anything sexual in which a child takes part."),
    "hatred": (
        "Hate/Identity Hate",
        "demeaning people for origin, faith, sex, orientation, disability or the like.",
    ),
    "harassment": ("Harassment", "bullying, stalking or humiliating a person."),
    "threat": ("Threat", "announcing harm to a person or to what is theirs."),
    "profanity": ("Profanity", "swearing and obscene language."),
}
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
    "S1": "Violent Crimes",
    "S2": "Non-Violent Crimes",
    "S3": "Sex Crimes",
    "S4": "Child Exploitation",
    "S5": "Defamation",
    "S6": "Specialized Advice",
    "S7": "Privacy",
    "S8": "Intellectual Property",
    "S9": "Indiscriminate Weapons",
    "S10": "Hate",
    "S11": "Self-Harm",
    "S12": "Sexual Content",
    "S13": "Elections",
    "s14": "Code Interpreter Abuse",  # lower case, as upstream
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
    # The released code counts on where O9 is absent: O10 to O12 are reported one place late.
    line = re.match(r".*\nO* *(\d+) *$", answer, re.MULTILINE)
    names = [name for place, name in enumerate(_AEGIS, 1) if line and int(line[1]) == place]
    return Verdict(False, "", tuple(names))


def decide_llama_guard_3(answer: str) -> Verdict:
    """Verdict of an answer of Llama Guard 3: "safe", or "unsafe" and lines such as "S1,S10"."""
    if "unsafe" not in answer.lower():
        return Verdict(True)
    codes = re.split(r"[,\n]", answer.replace("<|eot_id|>", ""))[1:]
    names = (_LLAMA_GUARD_3.get(code.strip(), "") for code in codes)
    return Verdict(False, "", tuple(filter(None, names)))


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
    topics = zip((*range(1, 9), 10, 11, 12), _AEGIS.values(), strict=True)
    policy = "\n".join(f"O{code}: {title}.\nShould not: {what}" for code, (title, what) in topics)
    return (
        f"[INST] {_AEGIS_TASK}\n\n"
        f"<BEGIN UNSAFE CONTENT CATEGORIES>\n{policy}\n<END UNSAFE CONTENT CATEGORIES>\n\n"
        f"<BEGIN CONVERSATION>\n\nUser: {text}\n\n<END CONVERSATION>\n\n{_AEGIS_ANSWER} [/INST]"
    )


@dataclass(frozen=True)
class GuardModel:
    """A guard model."""

    name: str
    released: str  # repository
    question: Callable[[str], Any]  # prompt -> text to answer, or the user's turn of a conversation
    decide: Callable[[str], Verdict]
    chat: Mapping[str, Any] | None  # variables of the chat template; None where it is not used
    max_tokens: int = 100  # of an answer
    adapter: str = ""  # repository of low-rank weights that are added


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
    chat={"categories": {code: f"{name}." for code, name in _LLAMA_GUARD_3.items()}},
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
        [network] = self.networks
        tokens = torch.tensor([ids], device=network.device)
        answer: list[int] = []
        cache = None
        while len(answer) < self.model.max_tokens:
            output = network(
                input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1
            )
            cache, logits = output.past_key_values, output.logits[0, -1]
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


_VARIANTS = ("use_dora", "use_rslora", "fan_in_fan_out", "modules_to_save", "rank_pattern", "bias")


@torch.no_grad()
def merge_adapter(network: nn.Module, folder: Path) -> None:
    """Add the low-rank weights of a PEFT folder to `network`: W + (alpha / rank) B A."""
    settings = read_json(folder / "adapter_config.json")
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    wrong = [name for name in _VARIANTS if settings.get(name) not in (None, False, "none", [], {})]
    if wrong or type(rank) is not int or rank < 1 or not isinstance(alpha, int | float):
        problem = f"unsupported {wrong}" if wrong else f"r is {rank!r}, lora_alpha {alpha!r}"
        raise CheckpointError(f"{folder}/adapter_config.json: {problem}")
    paths = [folder / f"adapter_model.{suffix}" for suffix in ("safetensors", "bin")]
    checkpoint = open_checkpoint(next(filter(Path.is_file, paths), paths[0]))
    halves = {n.replace(".default.", "."): checkpoint.read(n).float() for n in checkpoint.entries}
    for name, layer in network.named_modules():
        names = [f"base_model.model.{name}.lora_{half}.weight" for half in "BA"]
        if not isinstance(layer, nn.Linear) or not halves.keys() >= {*names}:
            continue
        up, down = map(halves.pop, names)
        out_features, in_features = layer.weight.shape
        if (*up.shape, *down.shape) != (out_features, rank, rank, in_features):
            raise CheckpointError(f"{checkpoint.path} has other shapes than the model at {name}")
        # the sum in float32, as upstream, which casts afterwards
        layer.weight.copy_(layer.weight.float() + alpha / rank * (up @ down))
    if halves:
        raise CheckpointError(f"{checkpoint.path} does not fit the model: {', '.join(halves)}")
