"""Guardrails that are language models: Aegis, Llama Guard 3, Qwen3Guard.

The networks are transformers'. Answers are decoded greedily: the first line is the verdict, and
drawing it at random, as the checkpoints' own settings would, makes a refusal a matter of luck.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from worldline.errors import CheckpointError
from worldline.files import read_json
from worldline.guardrails.base import Verdict
from worldline.weights.networks import pretrained, pretrained_tokenizer
from worldline.weights.read import open_checkpoint

# category texts are this project's own words for the topics that the model was taught
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
    "s14": "Code Interpreter Abuse.",  # lower case, as the model is given it upstream
}

# personal data, politics and copyright refuse too, and are not reported
_QWEN3GUARD = re.compile(
    "Violent|Non-violent Illegal Acts|Sexual Content or Sexual Acts|Suicide & Self-Harm"
    "|Unethical Acts|Jailbreak"
)
_QWEN3GUARD_SAFETY = re.compile(r"Safety: (Safe|Unsafe|Controversial)")
# how an answer that lets pass begins; the released code takes all that do not say "unsafe"
_IN_FAVOUR = re.compile(r"\s*safe\b|.*Safety: (?:Safe|Controversial)\b", re.DOTALL | re.IGNORECASE)


def decide_aegis(answer: str) -> Verdict:
    """Read an answer of Aegis: "safe", or "unsafe" and a line such as "O3"."""
    if "unsafe" not in answer.lower():
        return Verdict(True)
    # There is no O9, and the released code counts on: O10 to O12 are reported one place late.
    try:
        place = int(answer.split("\n")[1].lstrip("O")) - 1
    except (IndexError, ValueError):
        place = -1
    return Verdict(False, "", (_AEGIS[place][0],) if 0 <= place < len(_AEGIS) else ())


def decide_llama_guard_3(answer: str) -> Verdict:
    """Read an answer of Llama Guard 3: "safe", or "unsafe" and lines such as "S1,S10"."""
    if "unsafe" not in answer.lower():
        return Verdict(True)
    codes = re.split(r"[,\n]", answer.replace("<|eot_id|>", ""))[1:]
    found = (_LLAMA_GUARD_3.get(code.strip(), "") for code in codes)
    return Verdict(False, "", tuple(name.removesuffix(".") for name in found if name))


def decide_qwen3guard(answer: str) -> Verdict:
    """Read an answer of Qwen3Guard; what names no verdict is refused."""
    said = _QWEN3GUARD_SAFETY.search(answer)
    if said is None:
        return Verdict(False, "unreadable")
    if said[1] != "Unsafe":
        return Verdict(True)
    return Verdict(False, "", tuple(_QWEN3GUARD.findall(answer)))


def aegis_prompt(text: str) -> str:
    """Return what Aegis is asked about a prompt."""
    policy = "\n".join(f"{code}: {title}.\nShould not: {what}" for _, code, title, what in _AEGIS)
    return (
        f"[INST] {_AEGIS_TASK}\n\n"
        f"<BEGIN UNSAFE CONTENT CATEGORIES>\n{policy}\n<END UNSAFE CONTENT CATEGORIES>\n\n"
        f"<BEGIN CONVERSATION>\n\nUser: {text}\n\n<END CONVERSATION>\n\n{_AEGIS_ANSWER} [/INST]"
    )


def _ask_aegis(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(aegis_prompt(text), add_special_tokens=False)["input_ids"]


def _ask_llama_guard_3(tokenizer: Any, text: str) -> list[int]:
    message = [{"role": "user", "content": [{"type": "text", "text": text}]}]
    return _chat(tokenizer, message, categories=dict(_LLAMA_GUARD_3))


def _ask_qwen3guard(tokenizer: Any, text: str) -> list[int]:
    return _chat(tokenizer, [{"role": "user", "content": text}])


def _without_marks(tokenizer: Any, text: str) -> str:
    """Return `text` without what would end its turn, and let it answer for the model."""
    for mark in tokenizer.get_added_vocab():
        if len(mark) > 1:
            text = text.replace(mark, f"{mark[0]} {mark[1:]}")
    return text


def _chat(tokenizer: Any, messages: list[dict[str, Any]], **values: Any) -> list[int]:
    """Return the tokens of a conversation; the template is the one in the tokenizer's folder."""
    asked = tokenizer.apply_chat_template(messages, tokenize=False, **values)
    return tokenizer(asked, add_special_tokens=False)["input_ids"]  # the template has its own


@dataclass(frozen=True)
class Kind:
    """One of the guard models.

    Attributes:
        name: as reports call it.
        released: its repository.
        ask: (tokenizer, prompt) -> token ids.
        decide: answer -> verdict.
        longest: tokens of an answer.
        chat: `ask` needs the tokenizer's chat template.
        adapter: repository of weights that are added; "" for none.
    """

    name: str
    released: str
    ask: Callable[[Any, str], list[int]]
    decide: Callable[[str], Verdict]
    longest: int
    chat: bool = True
    adapter: str = ""


AEGIS = Kind(
    "aegis",
    "meta-llama/LlamaGuard-7b",
    _ask_aegis,
    decide_aegis,
    100,
    chat=False,
    adapter="nvidia/Aegis-AI-Content-Safety-LlamaGuard-Defensive-1.0",
)
LLAMA_GUARD_3 = Kind(
    "llama_guard_3", "meta-llama/Llama-Guard-3-8B", _ask_llama_guard_3, decide_llama_guard_3, 100
)
QWEN3GUARD = Kind("qwen3guard", "Qwen/Qwen3Guard-Gen-0.6B", _ask_qwen3guard, decide_qwen3guard, 128)


class LanguageGuard:
    """A text guard that asks a language model."""

    def __init__(self, kind: Kind, network: Any, tokenizer: Any, ends: set[int]) -> None:
        """Put the parts together.

        Args:
            kind: which model this is.
            network: a causal language model of transformers.
            tokenizer: its tokenizer.
            ends: ids of tokens that end an answer.
        """
        self.name = kind.name
        self.kind = kind
        self.network: nn.Module = network
        self.networks = (network,)
        self.tokenizer = tokenizer
        self.ends = ends
        self.room: int = network.config.max_position_embeddings

    def check(self, text: str) -> Verdict:
        ids = self.kind.ask(self.tokenizer, _without_marks(self.tokenizer, text))
        if len(ids) > self.room:
            return Verdict(False, "too long")  # what the model was not taught to read to its end
        answer = self._answer(ids)
        verdict = self.kind.decide(answer)
        if verdict.safe and not _IN_FAVOUR.match(answer):
            return Verdict(False, "unreadable")  # "not safe" is none in favour, nor is silence
        return verdict

    @torch.inference_mode()
    def _answer(self, ids: list[int]) -> str:
        """Return what the model says behind the tokens, its special tokens left out."""
        tokens = torch.tensor([ids], device=next(self.network.parameters()).device)
        said: list[int] = []
        cache = None
        while len(said) < self.kind.longest:
            output = self.network(
                input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1
            )
            cache = output.past_key_values
            logits: Tensor = output.logits[0, -1]
            if not logits.isfinite().all():
                return ""  # numbers that mean nothing name no verdict, which is a refusal
            token = int(logits.argmax())
            if token in self.ends:
                break
            said.append(token)
            tokens = tokens.new_tensor([[token]])
        return self.tokenizer.decode(said, skip_special_tokens=True)


def load_language_guard(
    kind: Kind,
    folder: Path,
    device: torch.device | str,
    dtype: torch.dtype = torch.bfloat16,
    adapter: Path | None = None,
) -> LanguageGuard:
    """Load a guard model from its folder, as released; nothing in it is executed.

    Args:
        kind: which one.
        folder: config.json, safetensors and tokenizer files.
        device: where it runs.
        dtype: of the weights.
        adapter: folder of the adapter, for a kind that has one.

    Raises:
        CheckpointError: a file is absent or does not fit.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if kind.adapter and adapter is None:
        raise CheckpointError(f"{kind.name} needs the folder of {kind.adapter}")
    network = pretrained(AutoModelForCausalLM, folder, dtype)
    tokenizer = pretrained_tokenizer(folder, chat=kind.chat)
    ends: set[int] = set()
    settings = network.generation_config, AutoConfig.from_pretrained(folder), tokenizer
    for each in settings:
        end = getattr(each, "eos_token_id", None)
        ends |= {end} if isinstance(end, int) else set(end or ())
    if not ends:
        raise CheckpointError(f"{folder} does not say which token ends an answer")
    if adapter is not None:
        merge_adapter(network, adapter)
    return LanguageGuard(kind, network.to(device), tokenizer, ends)


_ADAPTER_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.(?:default\.)?weight")


def merge_adapter(network: nn.Module, folder: Path) -> None:
    """Add the low-rank weights of a PEFT folder to `network`: W + (alpha / rank) B A.

    Raises:
        CheckpointError: the folder is not of such an adapter, or not of this network.
    """
    settings = read_json(folder / "adapter_config.json")
    try:
        rank, alpha = int(settings["r"]), float(settings["lora_alpha"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder}/adapter_config.json: {error!r}") from error
    unknown = [
        name
        for name in ("use_dora", "use_rslora", "fan_in_fan_out", "modules_to_save", "rank_pattern")
        if settings.get(name)
    ]
    if unknown or settings.get("bias", "none") != "none" or rank < 1:
        raise CheckpointError(f"{folder} is an adapter of another kind ({', '.join(unknown)})")
    files = [folder / f"adapter_model.{end}" for end in ("safetensors", "bin")]
    present = [path for path in files if path.is_file()]
    if not present:
        raise CheckpointError(f"{folder} holds no adapter_model.safetensors")
    checkpoint = open_checkpoint(present[0])
    halves: dict[str, dict[str, str]] = {}
    for name in checkpoint.entries:
        found = _ADAPTER_KEY.fullmatch(name)
        if found is None:
            raise CheckpointError(f"{present[0]} holds {name}, which is no low-rank weight")
        halves.setdefault(found[1], {})[found[2]] = name
    if not halves:
        raise CheckpointError(f"{present[0]} holds no weights")
    modules = dict(network.named_modules())
    for name, pair in halves.items():
        layer = modules.get(name)
        if not isinstance(layer, nn.Linear) or pair.keys() != {"A", "B"}:
            raise CheckpointError(f"{present[0]} does not fit the model at {name}")
        down, up = (checkpoint.read(pair[half]).float() for half in "AB")
        if (*up.shape[:1], *down.shape[1:]) != tuple(layer.weight.shape) or down.shape[0] != rank:
            raise CheckpointError(f"{present[0]} has other shapes than the model at {name}")
        with torch.no_grad():  # the sum in float32, as upstream, which casts afterwards
            whole = layer.weight.float() + (alpha / rank) * (up @ down)
            layer.weight.copy_(whole)
