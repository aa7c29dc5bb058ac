"""Words to ids."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from worldline.errors import CheckpointError, Error
from worldline.text.prompt_tokens import ByteTokenizer, load_tokenizer, tokenizer_files


def write_vocabulary(path: Path, *, ends: bool = True, **more: object) -> Path:
    """Write a tokenizer.json of letters, in the way of T5's."""
    pieces = [["<pad>", 0.0], ["</s>", 0.0], ["<unk>", -9.0], *([c, -1.0] for c in "▁abc")]
    after = [{"Sequence": {"id": "A", "type_id": 0}}]
    if ends:
        after.append({"SpecialToken": {"id": "</s>", "type_id": 0}})
    settings = {
        "version": "1.0",
        "added_tokens": [
            {
                "id": i,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for i, token in enumerate(("<pad>", "</s>", "<unk>"))
        ],
        "normalizer": {"type": "NFKC"},
        "pre_tokenizer": {
            "type": "Metaspace",
            "replacement": "▁",
            "prepend_scheme": "always",
            "split": True,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": after,
            "pair": after,
            "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
        },
        "model": {"type": "Unigram", "unk_id": 2, "vocab": pieces, "byte_fallback": False},
        **more,
    }
    path.write_text(json.dumps(settings))
    return path


def test_bytes() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("") == [1]
    assert tokenizer.encode("aé") == [0x61 + 3, 0xC3 + 3, 0xA9 + 3, 1]
    assert tokenizer.encode("\ud800") == [ord("?") + 3, 1]
    assert max(tokenizer.encode("\U0010ffff")) < tokenizer.size


def test_a_vocabulary(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_vocabulary(tmp_path / "tokenizer.json"))
    assert tokenizer.size == 7
    assert tokenizer.encode("") == [1]
    assert tokenizer.encode("ab c") == [3, 4, 5, 3, 6, 1]
    assert tokenizer.encode("a\ud800") == [3, 4, 2, 1]


def test_cutting_and_padding_of_the_file_are_not_used(tmp_path: Path) -> None:
    path = write_vocabulary(
        tmp_path / "tokenizer.json",
        truncation={
            "direction": "Right",
            "max_length": 3,
            "strategy": "LongestFirst",
            "stride": 0,
        },
        padding={
            "strategy": {"Fixed": 9},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "<pad>",
        },
    )
    assert load_tokenizer(path).encode("abc") == [3, 4, 5, 6, 1]


def test_damaged_and_foreign_files(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_tokenizer(path)
    with pytest.raises(CheckpointError, match="does not end a prompt with token 1"):
        load_tokenizer(write_vocabulary(path, ends=False))


def test_pieces_need_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "spiece.model").write_bytes(b"\n")
    [path] = tokenizer_files(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Error, match="pip install sentencepiece"):
        load_tokenizer(path)


def test_which_file_decides(tmp_path: Path) -> None:
    assert tokenizer_files(tmp_path) == []
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text('{"tokenizer_class": "T5Tokenizer"}')
    assert tokenizer_files(tmp_path) == []
    (tmp_path / "spiece.model").touch()
    assert tokenizer_files(tmp_path) == [tmp_path / "spiece.model", settings]
    (tmp_path / "tokenizer.json").touch()
    assert tokenizer_files(tmp_path) == [tmp_path / "tokenizer.json", settings]
    settings.write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    assert tokenizer_files(tmp_path) == [settings]
    assert isinstance(load_tokenizer(settings), ByteTokenizer)
