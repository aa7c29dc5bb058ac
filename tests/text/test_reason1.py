"""The files of the Reason1 encoder, the chat around a prompt, and transformers' own results."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tiny.encoders import byte_chat_tokenizer, export_reason1, new_reason1
from worldline.errors import CheckpointError
from worldline.text.encoder import EmbeddingCache
from worldline.text.reason1 import (
    END,
    NUM_PARAMETERS,
    NUM_STREAMED,
    PAD,
    START,
    SYSTEM,
    ChatTokenizer,
    Reason1Encoder,
    Reason1Files,
    chat_text,
)
from worldline.weights.checkpoint import open_checkpoint, save

# config.json of nvidia/Cosmos-Reason1-7B, as far as it is about the language model
RELEASED: dict[str, Any] = {
    "model_type": "qwen2_5_vl",
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vocab_size": 152064,
}
PROMPTS = ["A ball rolls off a table.", "", "Größe ✓ 日本", "x" * 300]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder of bytes, in float32; copy it before changing it."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("text") / "Cosmos-Reason1-7B"
    encoder = new_reason1({"num_hidden_layers": 3})
    for parameter in encoder.parameters():  # biases begin as zeros, and would not be seen
        torch.nn.init.normal_(parameter, 0.5 * (parameter.ndim == 1), 0.1)
    export_reason1(encoder, folder, dtype=None)
    return folder


@pytest.fixture
def own(exported: Path, tmp_path: Path) -> Path:
    """A copy of `exported` that a test may break."""
    return Path(shutil.copytree(exported, tmp_path / "encoder"))


def loaded(folder: Path, dtype: torch.dtype = torch.float32) -> Reason1Encoder:
    return Reason1Files.open(folder).read("cpu", dtype)


def weights(folder: Path) -> dict[str, Tensor]:
    checkpoint = open_checkpoint(folder / "model.safetensors")
    return {name: checkpoint.read(name).clone() for name in checkpoint.tensors}


def change(path: Path, **settings: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def refused(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        Reason1Files.open(folder)
    assert str(folder) in str(caught.value)
    return str(caught.value)


# --- the network


@pytest.mark.parametrize("layout", ["released", "since"])
def test_transformers_computes_the_same(exported: Path, own: Path, layout: str) -> None:
    """Its whole model, with eyes and head, three axes of position and no mask."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    settings = json.loads((exported / "config.json").read_text())
    rotary = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "out_hidden_size": 64}
    text = {**settings, "rope_parameters": rotary, "model_type": "qwen2_5_vl_text"}
    config = Qwen2_5_VLConfig(text_config=text, vision_config={**vision, "intermediate_size": 32})
    theirs = Qwen2_5_VLForConditionalGeneration(config).eval()
    tensors = weights(exported)
    language = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    theirs.model.language_model.load_state_dict(language)

    encoder = loaded(exported)
    [ids] = encoder.tokenize(PROMPTS)
    states = theirs(input_ids=ids, output_hidden_states=True).hidden_states
    assert len(states) == 4
    for ours, other in zip(encoder.hidden(ids), states, strict=True):
        torch.testing.assert_close(ours, other, atol=1e-5, rtol=1e-5)
    parts = [(x - x.mean(-1, True)) / (x.std(-1, keepdim=True) + 1e-8) for x in states[1:]]
    torch.testing.assert_close(encoder.encode(PROMPTS), torch.cat(parts, -1), atol=1e-4, rtol=1e-4)

    # and what it saves is read, by the names of either time
    theirs.save_pretrained(own)
    if layout == "since":
        state = {name: tensor.contiguous() for name, tensor in theirs.state_dict().items()}
        assert {n.partition("model.language_model.")[2] for n in state} - {""} == set(language)
        save(state, own / "model.safetensors")
    assert torch.equal(loaded(own).encode(PROMPTS), encoder.encode(PROMPTS))


def test_rows_are_normalised_layer_by_layer(exported: Path) -> None:
    encoder = loaded(exported)
    embeddings = encoder.encode(PROMPTS)
    assert embeddings.shape == (4, 128, 3 * 64)
    layers = embeddings.unflatten(-1, (3, 64))
    assert torch.allclose(layers.mean(-1), torch.zeros(()), atol=1e-5)
    assert torch.allclose(layers.std(-1), torch.ones(()), atol=1e-4)


def test_tokens_see_what_was_before_them_and_padding_counts(exported: Path) -> None:
    encoder = loaded(exported)
    [ids] = encoder.tokenize(["a ball"])
    whole = encoder.embed(ids)
    used = len(encoder.tokenizer.encode("a ball"))
    other = ids.clone()
    other[0, used + 5] = 7
    changed = encoder.embed(other)
    torch.testing.assert_close(changed[:, : used + 5], whole[:, : used + 5])
    assert not torch.allclose(changed[:, -1], whole[:, -1], atol=1e-3)
    assert whole[:, used:].abs().amin(-1).max() > 0  # rows of padding are not blanked


def test_a_prompt_alone_and_among_others(exported: Path) -> None:
    encoder = loaded(exported)
    together = encoder.encode(PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        assert torch.equal(encoder.encode([prompt])[0], together[row])


def test_embed_is_differentiable_in_every_parameter() -> None:
    encoder = new_reason1()
    embeddings = encoder.embed(*encoder.tokenize(["a ball rolls", "b"]))
    (embeddings * torch.randn_like(embeddings)).sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_inference_leaves_no_gradient(exported: Path) -> None:
    encoder = loaded(exported)
    assert not encoder.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not new_reason1().encode(["a"]).requires_grad


def test_bfloat16_is_near_float32(exported: Path) -> None:
    exact = loaded(exported).encode(PROMPTS)
    rough = loaded(exported, torch.bfloat16)
    assert {parameter.dtype for parameter in rough.parameters()} == {torch.bfloat16}
    found = rough.encode(PROMPTS)
    assert found.dtype == torch.bfloat16
    assert (found.float() - exact).norm() < 0.05 * exact.norm()
    # the angles of position stay float32: bfloat16 cannot tell neighbours apart
    assert rough.network.rotary_emb.inv_freq.dtype == torch.float32


def test_new_weights_follow_the_seed() -> None:
    torch.manual_seed(7)
    first = new_reason1().encode(["a ball"])
    torch.manual_seed(7)
    assert torch.equal(new_reason1().encode(["a ball"]), first)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(exported: Path, dtype: torch.dtype) -> None:
    exact = loaded(exported).encode(PROMPTS)
    found = Reason1Files.open(exported).read("cuda", dtype).encode(PROMPTS)
    assert found.device.type == "cuda"
    gap = (found.cpu().float() - exact).norm() / exact.norm()
    assert gap < (1e-4 if dtype == torch.float32 else 0.05)


# --- prompts to ids


def test_the_chat() -> None:
    assert chat_text("a {b}\n") == (
        "<|im_start|>system\nYou are a helpful assistant who will provide prompts to an image "
        "generator.<|im_end|>\n<|im_start|>user\na {b}\n<|im_end|>\n"
    )
    tokenizer = byte_chat_tokenizer()
    vocabulary = tokenizer.vocabulary
    [ids] = [tokenizer.encode("ab")]
    signs = {number: sign for sign, number in vocabulary.items()}
    line = signs[ids[3]]
    assert [signs[n] for n in ids] == [
        *(START, f"system\n{SYSTEM}", END, line, START, "user\n"),
        *("a", "b", END, line),
    ]
    assert (tokenizer.pad, tokenizer.size) == (vocabulary[PAD], len(vocabulary))


def test_a_prompt_is_neither_stripped_nor_escaped() -> None:
    tokenizer = byte_chat_tokenizer()
    around = len(tokenizer.encode(""))
    assert len(tokenizer.encode("  a \n")) == around + 5
    assert len(tokenizer.encode(f"a{END}b")) == around + 3
    assert len(tokenizer.encode("\ud800")) == around + 1  # "?": it has no UTF-8


def test_lengths(exported: Path) -> None:
    encoder = loaded(exported)
    whole = encoder.tokenizer.encode("abcdefgh")
    [ids] = encoder.tokenize(["abcdefgh"])
    assert ids[0].tolist() == whole + [encoder.tokenizer.pad] * (128 - len(whole))
    encoder.max_length = 13
    [ids] = encoder.tokenize(["abcdefgh", "abcde"])
    assert ids.tolist() == [whole[:13], encoder.tokenizer.encode("abcde")]


def test_a_vocabulary_in_two_files(own: Path) -> None:
    """Ids are the same as by tokenizer.json, with merges and with the words split as Qwen2 does."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {sign: number for number, sign in enumerate([*alphabet, "ba", "ll", "ball"])}
    (own / "tokenizer.json").unlink()
    (own / "vocab.json").write_text(json.dumps(vocabulary))
    merges = ["b a", "l l", "ba ll"]
    (own / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    special = [PAD, START, END]
    added = {
        str(len(vocabulary) + number): {
            **dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False),
            "content": token,
            "special": True,
        }
        for number, token in enumerate(special)
    }
    settings = {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": added}
    (own / "tokenizer_config.json").write_text(json.dumps(settings))
    files = Reason1Files.open(own)
    names = {"vocab.json", "merges.txt", "tokenizer_config.json"}
    assert names < {path.name for path in files.files}
    assert files.max_length == 512
    pairs = [tuple(merge.split()) for merge in merges]
    other = Tokenizer(models.BPE(vocabulary, pairs))
    other.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    other.add_special_tokens(special)
    expected = ChatTokenizer(other, "here")
    ours = files.tokenizer
    assert (ours.pad, ours.size) == (expected.pad, expected.size) == (259, 262)
    assert ours.encode("a ball") == expected.encode("a ball")
    assert vocabulary["ball"] in ours.encode("a ball")


def test_a_vocabulary_of_another_model(own: Path) -> None:
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({START: 0, PAD: 1}, unk_token=PAD)).save(str(own / "tokenizer.json"))
    with pytest.raises(CheckpointError, match=r"no <\|im_end\|>"):
        loaded(own)
    (own / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read"):
        loaded(own)


# --- the released encoder, without its weights


@pytest.mark.parametrize("form", ["flat", "nested", "nested rotation", "tiny"])
def test_sizes_of_a_config(own: Path, form: str) -> None:
    """Sizes and rotation, wherever transformers has kept them; counted without the network."""
    config = {**RELEASED, "rope_theta": 5e5}
    if form.startswith("nested"):
        names = [name for name in config if name not in ("model_type", "rope_theta")]
        text = {name: config.pop(name) for name in names}
        text["rope_theta"] = config.pop("rope_theta")
        if form == "nested rotation":
            text["rope_parameters"] = {"rope_theta": text.pop("rope_theta")}
        config["text_config"] = text
    if form != "tiny":
        (own / "config.json").write_text(json.dumps(config))
    files = Reason1Files.open(own)
    with torch.device("meta"):
        network = Reason1Encoder(files.config, None, 1).network
    sizes = {name: parameter.numel() for name, parameter in network.named_parameters()}
    count, streamed = sum(sizes.values()), files.blocks.count(sizes)
    if form == "tiny":
        assert (files.num_parameters, files.num_streamed) == (count, streamed)
    else:
        assert (files.width, count, streamed) == (100_352, NUM_PARAMETERS, NUM_STREAMED)
        assert network.config.rope_parameters["rope_theta"] == 5e5
        assert network.config.rms_norm_eps == 1e-6


# --- files


def test_a_folder_is_opened_without_transformers(exported: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from worldline.text.reason1 import Reason1Files; "
        f"assert Reason1Files.open(Path({str(exported)!r})).files; "
        "assert not {'transformers', 'tokenizers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_opened_folder(exported: Path) -> None:
    files = Reason1Files.open(exported)
    assert (files.folder, files.width, files.max_length) == (exported, 192, 128)
    assert {path.name for path in files.files} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_tokenizer_beside_as_diffusers_saves_it(own: Path) -> None:
    (own.parent / "tokenizer").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (own / name).rename(own.parent / "tokenizer" / name)
    assert Reason1Files.open(own).max_length == 128
    assert len(Reason1Files.open(own).tokenizer.encode("abc")) == 11


def test_missing_parts(own: Path) -> None:
    assert "no config.json" in refused(own / "nowhere")
    (own / "tokenizer.json").unlink()
    assert "no tokenizer.json" in refused(own)
    (own / "model.safetensors").unlink()
    assert "no weights" in refused(own)
    (own / "config.json").unlink()
    assert "no config.json" in refused(own)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"model_type": "t5"}, "expected qwen2_5_vl"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"text_config": {"vocab_size": 0}}, "vocab_size is 0"),
    ],
)
def test_sizes_that_are_refused(own: Path, settings: dict[str, Any], word: str) -> None:
    change(own / "config.json", **settings)
    assert word in refused(own)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"num_attention_heads": 3}, "hidden_size"),
        ({"hidden_act": "strange"}, "strange"),
        ({"rope_scaling": 4.0}, "float"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
    ],
)
def test_settings_that_make_no_encoder(own: Path, settings: dict[str, Any], word: str) -> None:
    change(own / "config.json", **settings)
    with pytest.raises(CheckpointError, match=rf"config\.json .*{word}"):
        loaded(own)


@pytest.mark.parametrize(
    "rotation",
    [None, {}, {"mrope_section": [2, 3, 3]}, {"type": "mrope"}, {"rope_type": "default"}],
)
def test_rotations_of_the_released_kind(own: Path, rotation: dict[str, Any] | None) -> None:
    expected = loaded(own).encode(PROMPTS[:1])
    change(own / "config.json", rope_scaling=rotation)
    assert torch.equal(loaded(own).encode(PROMPTS[:1]), expected)


def test_weights_of_another_model(own: Path) -> None:
    tensors = weights(own)
    name = "model.layers.1.self_attn.q_proj.bias"
    for state, named in (
        ({**tensors, name: torch.zeros(3)}, f"wrong shape: {name}"),
        ({n: t for n, t in tensors.items() if n != name}, f"1 missing: {name}"),
        ({**tensors, "model.layers.1.lora.weight": torch.ones(2)}, r"layers\.1\.lora\.weight"),
    ):
        save(state, own / "model.safetensors")
        with pytest.raises(CheckpointError, match=named):
            loaded(own)


def test_a_vocabulary_larger_than_the_encoder_s(own: Path) -> None:
    change(own / "config.json", vocab_size=200)
    with pytest.raises(CheckpointError, match=r"tokens, .* expects 200"):
        loaded(own)


def test_embeddings_are_kept(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLDLINE_CACHE", str(tmp_path))
    cache = EmbeddingCache(*Reason1Files.cached)
    [embedding] = loaded(exported, torch.bfloat16).encode(PROMPTS[:1])
    cache.put("encoder", PROMPTS[0], embedding[None])
    found = cache.get("encoder", PROMPTS[0])
    assert found is not None
    assert torch.equal(found, embedding[None])
    # 40 of the released size are not to push a thousand small ones of another encoder out
    assert cache.folder.parent == tmp_path / "embeddings"


def test_export_is_in_bfloat16(tmp_path: Path) -> None:
    encoder = new_reason1(max_length=32)
    export_reason1(encoder, tmp_path / "made" / "here")
    files = Reason1Files.open(tmp_path / "made" / "here")
    stored = files.checkpoint.tensors
    assert {info.dtype for info in stored.values()} == {torch.bfloat16}
    assert files.max_length == 32
    again = files.read("cpu", torch.float32)
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, encoder.get_parameter(name).bfloat16().float())
    assert again.tokenizer.encode("Größe") == encoder.tokenizer.encode("Größe")
