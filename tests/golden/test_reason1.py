"""The text encoder of Predict2.5 against the golden cases of kind reason1_tiny."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from cases import Case, cases

from worldline.text.reason1 import END, PAD, START, ChatTokenizer, Reason1Files, chat_text

CASES = cases("reason1_tiny")


def folder_of(case: Case) -> Path:
    [config] = case.path.rglob("config.json")
    return config.parent


def word_tokenizer(case: Case) -> ChatTokenizer:
    """Return one whose special tokens are the case's: the cases give ids in place of words."""
    from tokenizers import Tokenizer, models

    stated = case.spec["config"]
    words = [f"word{number}" for number in range(stated["vocab_size"])]
    words[stated["pad"]] = PAD
    free = [n for n in range(stated["text_vocab"]) if n != stated["pad"]]
    words[free[0]], words[free[1]] = START, END
    vocabulary = {word: number for number, word in enumerate(words)}
    return ChatTokenizer(Tokenizer(models.WordLevel(vocabulary, unk_token=END)), str(case))


@pytest.fixture
def files(case: Case, tmp_path: Path) -> Reason1Files:
    folder = tmp_path / folder_of(case).name
    folder.mkdir()
    for path in folder_of(case).iterdir():
        (folder / path.name).symlink_to(path)
    if not (folder / "tokenizer.json").exists():
        word_tokenizer(case).backend.save(str(folder / "tokenizer.json"))
    return Reason1Files.open(folder)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_embeddings(case: Case, files: Reason1Files) -> None:
    encoder = files.read("cpu", torch.float32)
    for name in case.names("*.input_ids"):
        prompt = name.removesuffix(".input_ids")
        length = case.tensor(f"{prompt}.padded_ids").shape[-1]
        assert encoder.max_length == length
        ids = encoder.fit([case.tensor(name).tolist()])
        case.compare(f"{prompt}.padded_ids", ids[0])
        case.compare(f"{prompt}.embeds", encoder.embed(ids))
        states = encoder.hidden(ids)
        for other in case.names(f"{prompt}.hidden*"):
            number = int(other.removeprefix(f"{prompt}.hidden"))
            rows = case.tensor(other).shape[1]
            case.compare(other, states[number][:, :rows])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_only_what_is_needed_is_read(case: Case, files: Reason1Files) -> None:
    encoder = files.read("cpu", torch.float32)
    count = sum(parameter.numel() for parameter in encoder.parameters())
    held = sum(math.prod(info.shape) for info in files.checkpoint.tensors.values())
    assert files.num_parameters == count < held
    assert files.check() > 0
    stated = case.spec["config"]
    assert files.width == stated["num_hidden_layers"] * stated["hidden_size"]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_chat_around_a_prompt(case: Case) -> None:
    """The vectors are of the released vocabulary, which a case may hold or not."""
    vectors = case.spec.get("real_tokenizer_vectors", {"cases": []})
    for vector in vectors["cases"]:
        text = vectors["text_format"].replace("\\n", "\n")
        text = text.replace("{system_text}", vectors["system_text"])
        assert chat_text(vector["prompt"]) == text.replace("{prompt}", vector["prompt"])
        ids = {START: vectors["im_start"], END: vectors["im_end"]}
        special = [n for n in vector["ids"] if n in ids.values()]
        found = re.findall(f"{re.escape(START)}|{re.escape(END)}", chat_text(vector["prompt"]))
        assert special == [ids[token] for token in found]
    if (folder_of(case) / "tokenizer.json").exists():
        tokenizer = Reason1Files.open(folder_of(case)).tokenizer
        for vector in vectors["cases"]:
            assert tokenizer.encode(vector["prompt"]) == vector["ids"]
            assert tokenizer.pad == vectors["pad_token_id"]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_tensor_is_used(case: Case) -> None:
    assert case.unused() == []
