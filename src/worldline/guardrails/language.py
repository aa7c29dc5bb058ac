"""Guardrails that are language models: Aegis, Llama Guard 3, Qwen3Guard.

The networks are transformers'. Answers are decoded greedily: sampling, as in the checkpoints' own
settings, would make a refusal a matter of luck.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import nn

from worldline.errors import CheckpointError
from worldline.guardrails.base import Verdict
from worldline.parallel.offload import BlockPlan
from worldline.repositories import find_repository
from worldline.weights.checkpoint import open_checkpoint
from worldline.weights.networks import (
    Count,
    Settings,
    mark_breaker,
    pretrained,
    pretrained_tokenizer,
    require_settings,
)

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

# what an answer begins with that the released code lets through
_NOT_UNSAFE = r"(?is)(?!.*unsafe)"
_SAFETY_FIRST = r"(?s)(?:(?!Safety: Unsafe).)*Safety: (?:Safe|Controversial)"
# what it begins with here; the released code accepts every answer without "unsafe"
_SAFE = re.compile(r"(?is)\s*safe\b|.*Safety: (?:Safe|Controversial)\b")


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
    """A guard model.

    Attributes:
        released: repository.
        question: prompt -> text to answer, or the user's turn of a conversation.
        accepts: pattern of the beginning of an answer that is in favour.
        category: pattern of a category in an answer.
        names: category in an answer -> in a report, where they differ.
        chat: variables of the chat template; None where it is not used.
        max_tokens: of an answer.
        adapter: repository of low-rank weights that are added.
    """

    name: str
    released: str
    question: Callable[[str], Any]
    accepts: str
    category: str
    names: Mapping[str, str] = field(default_factory=dict)
    chat: Mapping[str, Any] | None = None
    max_tokens: int = 100
    adapter: str = ""

    def decide(self, answer: str) -> Verdict:
        """Verdict of an answer by the released rule."""
        if re.match(self.accepts, answer):
            return Verdict(True)
        categories = re.findall(self.category, answer)
        return Verdict(False, tuple(self.names.get(name, name) for name in categories))


AEGIS = GuardModel(
    "aegis",
    "meta-llama/LlamaGuard-7b",
    aegis_prompt,
    _NOT_UNSAFE,
    r"(?m)\A.*\nO* *([1-9]|1[01]) *$",
    # The released code counts on where O9 is absent: O10 to O12 are reported one place late.
    {str(number): name for number, name in enumerate(_AEGIS, 1)},
    adapter="nvidia/Aegis-AI-Content-Safety-LlamaGuard-Defensive-1.0",
)
LLAMA_GUARD_3 = GuardModel(
    "llama_guard_3",
    "meta-llama/Llama-Guard-3-8B",
    lambda text: [{"type": "text", "text": text}],
    _NOT_UNSAFE,
    r"[,\n]\s*(S[1-9]|S1[0-3]|s14)\b",
    _LLAMA_GUARD_3,
    {"categories": {code: f"{name}." for code, name in _LLAMA_GUARD_3.items()}},
)
QWEN3GUARD = GuardModel(
    "qwen3guard",
    "Qwen/Qwen3Guard-Gen-0.6B",
    str,
    _SAFETY_FIRST,
    # personal data, politics and copyright refuse too, and are not reported
    "Violent|Non-violent Illegal Acts|Sexual Content or Sexual Acts|Suicide & Self-Harm"
    "|Unethical Acts|Jailbreak",
    chat={},
    max_tokens=128,
)


class LanguageGuard:
    """A text guardrail that asks a causal language model of transformers.

    Offloaded, it is streamed: an answer has a handful of tokens, each the time of a copy (0.3 s of
    8B at 50 GB/s).

    Attributes:
        words: a prompt -> the same without marks that would end its turn.
        max_length: largest number of tokens in a question; longer ones are refused.
    """

    blocks = BlockPlan("0.model.layers")  # of the only network

    def __init__(
        self, model: GuardModel, places: Sequence[Path], device: torch.device | str = "cpu"
    ) -> None:
        """Read the model and its adapter from repositories below `places`."""
        from transformers import AutoModelForCausalLM, GenerationConfig

        folder = find_repository(model.released, places)
        network = pretrained(AutoModelForCausalLM, folder, torch.bfloat16)
        if model.adapter:
            merge_adapter(network, find_repository(model.adapter, places))
        network.generation_config = GenerationConfig(
            eos_token_id=network.generation_config.eos_token_id,
            pad_token_id=0,
            max_new_tokens=model.max_tokens,
            output_logits=True,
            return_dict_in_generate=True,
        )
        self.name = model.name
        self.model = model
        self.networks = (network.to(device),)
        self.tokenizer = pretrained_tokenizer(folder, chat=model.chat is not None)
        self.words = mark_breaker(self.tokenizer, self._question, folder)
        self.max_length: int = network.config.max_position_embeddings

    def check(self, text: str) -> Verdict:
        ids = self.tokens(text)
        if len(ids) > self.max_length:
            return Verdict(False, ("too long",))
        answer = self._answer(ids)
        verdict = self.model.decide(answer)
        if verdict.safe and not _SAFE.match(answer):
            return Verdict(False, ("unreadable",))
        return verdict

    def tokens(self, text: str) -> list[int]:
        # a prompt that holds marks could end its turn and answer for the model
        question = self._question(self.words(text))
        return self.tokenizer(question, add_special_tokens=False)["input_ids"]

    def _question(self, text: str) -> str:
        question = self.model.question(text)
        if self.model.chat is None:
            return question
        turns = [{"role": "user", "content": question}]
        return self.tokenizer.apply_chat_template(turns, tokenize=False, **self.model.chat)

    @torch.inference_mode()
    def _answer(self, ids: list[int]) -> str:
        """Greedy answer without special tokens; "", which is refused, if logits are not finite."""
        [network] = self.networks
        tokens = torch.tensor([ids], device=network.device)
        output = network.generate(tokens, attention_mask=torch.ones_like(tokens))
        if not torch.stack(output.logits).isfinite().all():
            return ""
        return self.tokenizer.decode(output.sequences[0, len(ids) :], skip_special_tokens=True)


# variants that no tensor betrays, and how PEFT states their absence
_PLAIN = {
    "use_dora": False,
    "use_rslora": False,
    "fan_in_fan_out": False,
    "bias": "none",
    "alpha_pattern": {},
    "layers_to_transform": None,
}


class _Adapter(Settings):
    """Settings of adapter_config.json."""

    r: Count
    lora_alpha: Annotated[float, Field(strict=True)]
    target_modules: list[str] | str = ""  # ends of names; a pattern is not followed


@torch.no_grad()
def merge_adapter(network: nn.Module, folder: Path) -> None:
    """Add the low-rank weights of a PEFT folder to `network`: W + (alpha / rank) B A."""
    path = folder / "adapter_config.json"
    settings = _Adapter.parse(require_settings(path, _PLAIN), path)
    paths = [folder / f"adapter_model.{suffix}" for suffix in ("safetensors", "bin")]
    checkpoint = open_checkpoint(next(filter(Path.is_file, paths), paths[0]))
    named = settings.target_modules
    targets = () if isinstance(named, str) else tuple(f".{module}" for module in named)
    halves = {n.replace(".default.", "."): checkpoint.read(n).float() for n in checkpoint.entries}
    for name, weight in network.named_parameters():
        module = name.removesuffix(".weight")
        layer = f"base_model.model.{module}"
        names = [f"{layer}.lora_{half}.weight" for half in "BA"]
        if not halves.keys() >= {*names}:
            if f".{module}".endswith(targets):
                raise CheckpointError(f"{checkpoint.path} holds no {names[0]}")
            continue
        up, down = map(halves.pop, names)
        if [*up.shape, *down.shape] != [len(weight), settings.r, settings.r, *weight.shape[1:]]:
            raise CheckpointError(f"{checkpoint.path} has other shapes than the model at {name}")
        # the sum in float32, as upstream, which casts afterwards
        weight.copy_(weight.float() + settings.lora_alpha / settings.r * (up @ down))
    if halves:
        raise CheckpointError(f"{checkpoint.path} does not fit the model: {', '.join(halves)}")
