"""What a model needs is listed once, by the names of its generation, without what is not read."""

from __future__ import annotations

import pytest

from worldline.catalog import ENTRIES, FLOW_MODELS, FLOW_TOKENIZER, find
from worldline.downloads import OPTIONAL, choose, needs, select, sources
from worldline.errors import DownloadError, InputError
from worldline.hub import RemoteFile


def repositories(*models: str, **options: object) -> list[str]:
    return [source.repository for source in sources(models, **options)]  # type: ignore[arg-type]


def listed(*names: str) -> list[RemoteFile]:
    return [RemoteFile("a/b", "c", name, 1, "d", False) for name in names]


def test_every_entry_has_a_source_and_parts() -> None:
    for entry in ENTRIES:
        assert "/" in entry.repository
        for name in needs(entry):
            assert find(name) is not None
    families = {entry.family for entry in ENTRIES}
    assert set(OPTIONAL.values()) <= families


def test_a_base_model() -> None:
    assert repositories("Cosmos-Predict1-4B") == [
        "nvidia/Cosmos-Predict1-4B",
        "nvidia/Cosmos-Tokenize1-DV8x16x16-720p",
        "nvidia/Cosmos-Predict1-7B-Decoder-DV8x16x16ToCV8x8x8-720p",
        "nvidia/Cosmos-Tokenize1-CV8x8x8-720p",
        "nvidia/Cosmos-Guardrail1",  # takes no prompt: no Llama Guard, no T5
    ]
    bare = repositories("Cosmos-Predict1-4B", without=[*OPTIONAL.values()])
    assert bare[1:3] == [
        "nvidia/Cosmos-Tokenize1-DV8x16x16-720p",
        "nvidia/Cosmos-Tokenize1-CV8x8x8-720p",
    ]


def test_models_that_take_prompts() -> None:
    found = repositories("Cosmos-Predict1-7B-Video2World", "Cosmos-Predict1-5B-Video2World")
    assert len(found) == len(set(found))
    for name in ("google-t5/t5-11b", "meta-llama/Llama-Guard-3-8B"):
        assert name in found
    assert "mistral-community/pixtral-12b" in found
    assert "mistral-community/pixtral-12b" not in repositories("Cosmos-Predict1-7B-Text2World")


def test_cosmos_1_0() -> None:
    found = repositories("Cosmos-1.0-Diffusion-7B-Text2World")
    assert found == repositories("Cosmos-Predict1-7B-Text2World", generation="1.0")
    assert found == [
        "nvidia/Cosmos-1.0-Diffusion-7B-Text2World",
        "nvidia/Cosmos-1.0-Tokenizer-CV8x8x8",
        "google-t5/t5-11b",
        "nvidia/Cosmos-1.0-Prompt-Upsampler-12B-Text2World",
        "nvidia/Cosmos-1.0-Guardrail",
    ]


def test_predict2_5() -> None:
    for model in FLOW_MODELS:
        found = sources([model.name])
        assert [source.repository for source in found] == [
            model.repository,
            FLOW_TOKENIZER[0],
            "nvidia/Cosmos-Reason1-7B",
            "nvidia/Cosmos-Guardrail1",
            "Qwen/Qwen3Guard-Gen-0.6B",
        ]
        published = listed(model.file, "base/other/x_ema_bf16.pt", "tokenizer.pth", "LICENSE")
        names = [[file.name for file in choose(source, published)] for source in found[:2]]
        assert names == [[model.file, "LICENSE"], ["tokenizer.pth"]]
        assert [source.revision for source in found[:2]] == [model.revision, FLOW_TOKENIZER[1]]
        kind = model.name.partition("/")[2]
        for name in (f"{model.repository}/{kind}", f"{model.repository}/{kind}"[len("nvidia/") :]):
            assert sources([name]) == found
    first, large = FLOW_MODELS[0], FLOW_MODELS[2]
    assert sources([first.repository]) == sources([first.name])
    assert sources(["Cosmos-Predict2.5-14B"]) == sources([large.name])
    assert repositories(first.name, without=["guardrail"])[-1] == "nvidia/Cosmos-Reason1-7B"
    with pytest.raises(InputError, match="did you mean 2B/post-trained"):
        sources(["2B/posttrained"])


@pytest.mark.parametrize(
    ("model", "there", "fetched"),
    [
        (
            "Cosmos-Predict1-4B",
            ["README.md", "model.pt", "config.json", "nemo/x.ckpt", "guardrail/a"],
            ["model.pt", "config.json"],
        ),
        (
            "Cosmos-Tokenize1-CV8x8x8-720p",
            ["autoencoder.jit", "encoder.jit", "decoder.jit", "model.pt", "mean_std.pt"],
            ["encoder.jit", "decoder.jit", "mean_std.pt"],
        ),
        ("Cosmos-Tokenize1-CI8x8-360p", ["autoencoder.jit", "x"], ["autoencoder.jit"]),
        (
            "google-t5/t5-11b",
            ["pytorch_model.bin", "tf_model.h5", "spiece.model", "config.json"],
            ["pytorch_model.bin", "spiece.model", "config.json"],
        ),
        (
            "Llama-Guard-3-8B",
            ["model-1.safetensors", "original/consolidated.00.pth", "original/params.json"],
            ["model-1.safetensors"],
        ),
        (
            "Cosmos-Guardrail1",
            [
                "README.md",
                "blocklist/custom/a",
                "face_blur_filter/Resnet50_Final.pth",
                "video_content_safety_filter/models--a--b/blobs/0",
                "video_content_safety_filter/models--a--b/snapshots/0/config.json",
            ],
            [
                "blocklist/custom/a",
                "face_blur_filter/Resnet50_Final.pth",
                "video_content_safety_filter/models--a--b/snapshots/0/config.json",
            ],
        ),
    ],
)
def test_only_files_that_are_read(model: str, there: list[str], fetched: list[str]) -> None:
    (source, *_) = sources([model])
    assert [file.name for file in choose(source, listed(*there))] == fetched


def test_a_repository_without_what_is_needed() -> None:
    (source, *_) = sources(["Cosmos-Tokenize1-DV8x16x16-720p"])
    with pytest.raises(DownloadError, match="no encoder"):
        choose(source, listed("encoder.jit"))


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        (([], ["4B", "5B"], [], []), ["Cosmos-Predict1-4B", "Cosmos-Predict1-5B-Video2World"]),
        (([], ["7B"], ["Video2World"], []), ["Cosmos-Predict1-7B-Video2World"]),
        (
            ([], ["14B"], [], []),
            ["Cosmos-Predict1-14B-Text2World", "Cosmos-Predict1-14B-Video2World"],
        ),
        (([], [], [], ["CI8x8-360p"]), ["Cosmos-Tokenize1-CI8x8-360p"]),
        ((["Cosmos-1.0-Guardrail"], [], [], []), ["Cosmos-1.0-Guardrail"]),
        ((["guardrails"], [], [], []), ["Cosmos-Guardrail1", "Llama-Guard-3-8B"]),
        (
            ([], [], ["Text2World-Sample-AV-Multiview"], []),
            ["Cosmos-Predict1-7B-Text2World-Sample-AV-Multiview"],
        ),
    ],
)
def test_flags_of_the_released_scripts(
    asked: tuple[list[str], list[str], list[str], list[str]], found: list[str]
) -> None:
    assert select(*asked) == found


def test_groups_are_the_scripts_defaults() -> None:
    assert len(select(["autoregressive"], [], [], [])) == 4
    assert len(select(["diffusion"], [], [], [])) == 4
    assert len(select(["tokenizers"], [], [], [])) == 8
    assert select(["predict2.5"], [], [], []) == [model.name for model in FLOW_MODELS]


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (([], [], [], []), "nothing is named"),
        (([], ["4B"], ["Text2World"], []), "is of diffusion models"),
        (([], ["14B"], ["SingleToMultiView-Sample-AV"], []), "there is no"),
    ],
)
def test_what_goes_with_nothing(
    asked: tuple[list[str], list[str], list[str], list[str]], told: str
) -> None:
    with pytest.raises(InputError, match=told):
        select(*asked)


def test_an_unknown_name() -> None:
    with pytest.raises(InputError, match="did you mean Cosmos-Predict1-4B"):
        sources(["Cosmos-Predict1-4b"])
    with pytest.raises(InputError, match="is not released"):
        sources(["Cosmos-Predict1-4B_post-trained"])
    with pytest.raises(InputError, match="no model Cosmos-Predict1-4B/pre-trained"):
        sources(["Cosmos-Predict1-4B/pre-trained"])
    with pytest.raises(InputError, match="come with the package"):
        sources(["tiny-Cosmos-Predict1-4B"])
