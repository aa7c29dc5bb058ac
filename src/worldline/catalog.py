"""Every released checkpoint that is known: where it lies, what it holds, what it may be used for.

Sizes, parameters and MD5 sums are those of the released files; needs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from worldline.errors import did_you_mean
from worldline.files import TRANSFORMER_FILES

BUNDLED_PREFIX = "tiny-"

NVIDIA_LICENCE = "NVIDIA Open Model License"
APACHE_LICENCE = "Apache-2.0"
LLAMA_LICENCE = "Llama 3.1 Community License"

_WORLDS = ("autoregressive", "diffusion text", "diffusion video", "diffusion, other", "flow")

Presence = Literal["present", "other size", "partial", "absent"]


@dataclass(frozen=True)
class File:
    """One released file.

    Attributes:
        name: below the folder.
        nbytes: of its tensors; the file is a little larger. 0 where it is not known.
        md5: of the whole file; "" where none is published.
    """

    name: str
    nbytes: int = 0
    md5: str = ""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One released checkpoint.

    Attributes:
        name: of the newest folder.
        family: what kind of model it is.
        folders: names below the checkpoint folder, newest generation first.
        files: as released.
        layouts: sets of file patterns, each of which is a whole checkpoint.
        parameters: trained ones; 0 where it is not known.
        licence: of the weights.
        preset: name of its configuration in the family's PRESETS; "" for none.
        needs: names of other entries that a request as released needs.
        command: that runs it in this version; "" for none.
        failure_rates: percent of failed videos from 1 frame and from 9, as published.
    """

    name: str
    family: str
    folders: tuple[str, ...]
    files: tuple[File, ...]
    layouts: tuple[tuple[str, ...], ...]
    parameters: int = 0
    licence: str = NVIDIA_LICENCE
    preset: str = ""
    needs: tuple[str, ...] = ()
    command: str = ""
    failure_rates: tuple[int, int] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the first layout whose files are all known; 0 where none is."""
        sizes = {file.name: file.nbytes for file in self.files}
        for layout in self.layouts:
            if all(sizes.get(name) for name in layout):
                return sum(sizes[name] for name in layout)
        return 0

    def presence(self, checkpoint_dir: str | Path) -> tuple[Presence, Path | None]:
        """Tell whether the checkpoint is there, and in which folder; by names and sizes alone.

        "other size" is a whole checkpoint under the released name, but far smaller than it.
        """
        sizes = {file.name: file.nbytes for file in self.files}
        partial: Path | None = None
        for folder in self.folders:
            path = Path(checkpoint_dir) / folder
            if not path.is_dir():
                continue
            for layout in self.layouts:
                if all(_holds(path, pattern, sizes.get(pattern) or 1) for pattern in layout):
                    small = sum(_size(path, pattern) for pattern in layout) < self.nbytes / 2
                    return "other size" if small else "present", path
            partial = partial or path
        return ("partial", partial) if partial else ("absent", None)


def _holds(folder: Path, pattern: str, nbytes: int) -> bool:
    return any(path.is_file() and path.stat().st_size >= nbytes for path in folder.glob(pattern))


def _size(folder: Path, pattern: str) -> int:
    """Bytes of all that fits, the other ranks of a tensor-parallel set included."""
    return sum(path.stat().st_size for path in folder.glob(pattern.replace("_mp_0", "_mp_*")))


_TRANSFORMER_LAYOUTS = (
    *((name,) for name in TRANSFORMER_FILES),
    ("model_model_mp_0.pt",),
    ("iter_*.pt",),
)
_DIFFUSION_LAYOUTS = (
    *((name,) for name in TRANSFORMER_FILES),
    ("transformer/diffusion_pytorch_model*.safetensors",),
    ("iter_*.pt",),
)
# those of `worldline.tokenizers.cosmos.load`, which needs torch
TOKENIZER_LAYOUTS = (
    ("encoder.safetensors", "decoder.safetensors"),
    ("encoder.jit", "decoder.jit"),
    ("autoencoder.safetensors",),
    ("autoencoder.jit",),
    ("model.safetensors",),
    ("model.pt",),
)


@dataclass(frozen=True)
class FlowModel:
    """One of the released models of Cosmos-Predict2.5; nothing in its tensors tells it from others.

    Attributes:
        name: that it is asked for by.
        repository: on the hub.
        revision: of the repository.
        file: below the repository's folder.
        schedule: of its noise levels.
        known_timestep: what it is told of given frames; None tells it the same of all frames.
        experiment: name of the training run that it comes from.
    """

    name: str
    repository: str
    revision: str
    file: str
    experiment: str
    schedule: str = "shifted"
    known_timestep: float | None = None


def _flow_models() -> tuple[FlowModel, ...]:
    small, large = "nvidia/Cosmos-Predict2.5-2B", "nvidia/Cosmos-Predict2.5-14B"
    known = "15a82a2ec231bc318692aa0456a36537c806e7d4"
    stage = "Stage-c_pt_4-"
    first, second = f"{stage}reason_embeddings-v1p1-Index-26", f"{stage}Index-2"
    large_run = (
        f"{stage}reason_embeddings-v1p1-Index-43-Size-14B-Res-720-Fps-16_resume_from_reason1p1_"
        "rectified_flow_shift5_high_sigma"
    )
    return (
        FlowModel(
            "2B/post-trained",
            small,
            known,
            "base/post-trained/81edfebe-bd6a-4039-8c1d-737df1a790bf_ema_bf16.pt",
            f"{second}-Size-2B-Res-720-Fps-16-Note-rf_with_edm_ckpt",
            "karras",
            0.1,
        ),
        FlowModel(
            "2B/pre-trained",
            small,
            known,
            "base/pre-trained/d20b7120-df3e-4911-919d-db6e08bad31c_ema_bf16.pt",
            f"{first}-Size-2B-Res-720-Fps-16-Note-T2V_high_sigma_loss_reweighted_1_1_"
            "rectified_flow_only_resume2",
        ),
        FlowModel(
            "14B/post-trained",
            large,
            "2bc4ca5ba5a20b9858a7ddb856bc82d70b030fbe",
            "base/post-trained/e21d2a49-4747-44c8-ba44-9f6f9243715f_ema_bf16.pt",
            large_run,
        ),
        FlowModel(
            "14B/pre-trained",
            large,
            "03eb354f35eae0d6e0c1be3c9f94d8551e125570",
            "base/pre-trained/54937b8c-29de-4f04-862c-e67b04ec41e8_ema_bf16.pt",
            large_run,
        ),
    )


FLOW_MODELS = _flow_models()  # the first is the default
# of the tokenizer, which all of them share
FLOW_TOKENIZER = ("nvidia/Cosmos-Predict2.5-2B", "6787e176dce74a101d922174a95dba29fa5f0c55")


def find_flow_model(name: str) -> FlowModel | None:
    """Return the released model of Predict2.5 of this name; None if there is none."""
    return next((model for model in FLOW_MODELS if model.name == name), None)


_GUARDRAIL = "Cosmos-Guardrail1"
_PROMPT_GUARDRAIL = "Llama-Guard-3-8B"
_DISCRETE = "Cosmos-Tokenize1-DV8x16x16-720p"
_CONTINUOUS = "Cosmos-Tokenize1-CV8x8x8-720p"
DECODERS: dict[str, str] = {
    "Predict1": "Cosmos-Predict1-7B-Decoder-DV8x16x16ToCV8x8x8-720p",
    "1.0": "Cosmos-1.0-Diffusion-7B-Decoder-DV8x16x16ToCV8x8x8",
}
_DECODER = DECODERS["Predict1"]
_T5 = "google-t5/t5-11b"


def _autoregressive(
    size: str,
    parameters: int,
    nbytes: int,
    md5: str,
    failure_rates: tuple[int, int],
) -> Entry:
    base = "Video2World" not in size
    return Entry(
        name=f"Cosmos-Predict1-{size}",
        family="autoregressive base" if base else "autoregressive video2world",
        folders=(f"Cosmos-Predict1-{size}", f"Cosmos-1.0-Autoregressive-{size}"),
        files=(File("model.pt", nbytes, md5), File("config.json")),
        layouts=_TRANSFORMER_LAYOUTS,
        parameters=parameters,
        preset=size,
        needs=(
            *(_DISCRETE, _DECODER, _CONTINUOUS, _GUARDRAIL),
            *(() if base else (_T5, _PROMPT_GUARDRAIL)),
        ),
        command=f"autoregressive {'base' if base else 'video2world'}",
        failure_rates=failure_rates,
    )


def _tokenizer(
    kind: str,
    old: str,
    parameters: int,
    autoencoder: File,
    halves: tuple[File, ...] = (),
    more: tuple[File, ...] = (),
) -> Entry:
    name = f"Cosmos-Tokenize1-{kind}"
    video = kind[1] == "V"
    resolution_free = kind.split("-")[0]
    return Entry(
        name=name,
        family=f"{'discrete' if kind[0] == 'D' else 'continuous'} "
        f"{'video' if video else 'image'} tokenizer",
        folders=(name, old),
        files=(*halves, autoencoder, *more),
        layouts=TOKENIZER_LAYOUTS,
        parameters=parameters,
        preset=resolution_free if video else "",
    )


def _diffusion(size: str, kind: str, parameters: int, nbytes: int, md5: str) -> Entry:
    upsampler = "Cosmos-UpsamplePrompt1-12B-Text2World" if kind == "Text2World" else "Pixtral-12B"
    name = f"Cosmos-Predict1-{size}-{kind}"
    return Entry(
        name=name,
        family=f"diffusion {kind.lower()}",
        folders=(name, f"Cosmos-1.0-Diffusion-{size}-{kind}"),
        files=(File("model.pt", nbytes, md5),),
        layouts=_DIFFUSION_LAYOUTS,
        parameters=parameters,
        preset=f"{size}-{kind}",
        needs=(_CONTINUOUS, _T5, upsampler, _GUARDRAIL, _PROMPT_GUARDRAIL),
        command=f"diffusion {kind.lower()}",
    )


def _sample(kind: str, md5: str = "") -> Entry:
    name = f"Cosmos-Predict1-7B-{kind}"
    return Entry(
        name=name,
        family="diffusion, other",
        folders=(name,),
        files=(File("model.pt", md5=md5),),
        layouts=_DIFFUSION_LAYOUTS,
        needs=(_CONTINUOUS, _T5, _GUARDRAIL, _PROMPT_GUARDRAIL),
    )


def _flow(size: str, parameters: int, nbytes: int) -> Entry:
    name = f"Cosmos-Predict2.5-{size}"
    files = [model.file for model in FLOW_MODELS if model.repository.endswith(name)]
    vae = (File("tokenizer.pth", 507_570_124),) if size == "2B" else ()
    return Entry(
        name=name,
        family="flow",
        folders=(name, f"nvidia/{name}"),
        files=(*(File(file, nbytes) for file in files), *vae),
        layouts=(
            *((file,) for file in files),
            ("transformer/diffusion_pytorch_model*.safetensors",),
        ),
        parameters=parameters,
        preset=size,
        needs=("Cosmos-Reason1-7B", _GUARDRAIL, "Qwen3Guard-Gen-0.6B"),
        command="predict2.5",
    )


def _other(
    name: str,
    family: str,
    folders: tuple[str, ...],
    files: tuple[File, ...],
    licence: str = NVIDIA_LICENCE,
    layouts: tuple[tuple[str, ...], ...] | None = None,
    parameters: int = 0,
    needs: tuple[str, ...] = (),
) -> Entry:
    return Entry(
        name=name,
        family=family,
        folders=folders,
        files=files,
        layouts=layouts or (tuple(file.name for file in files),),
        parameters=parameters,
        licence=licence,
        needs=needs,
    )


ENTRIES: tuple[Entry, ...] = (
    _autoregressive(
        "4B", 4_014_088_192, 8_028_176_384, "5fdc62fc87fbf470dbcc2288589b7942", (15, 1)
    ),
    _autoregressive(
        "12B", 11_560_975_360, 23_121_950_720, "ed748fabcb544d30d35385a8c28efb4d", (2, 1)
    ),
    _autoregressive(
        "5B-Video2World", 4_584_845_312, 9_169_690_624, "2a48a854bb6e04abb6b7c72979f1a69b", (7, 2)
    ),
    _autoregressive(
        "13B-Video2World",
        13_323_125_760,
        26_646_251_520,
        "21a9fb02c61fbebc96c1af1fcaa5893f",
        (3, 0),
    ),
    _tokenizer(
        "DV8x16x16-720p",
        "Cosmos-1.0-Tokenizer-DV8x16x16",
        110_898_294,
        File("autoencoder.jit", 222_564_680, "606b8585b637f06057725cbb67036ae6"),
        (
            File("encoder.jit", 91_842_388, "95186b0410346a3f0cf250b76daec452"),
            File("decoder.jit", 131_490_340, "f0c8a9d992614a43e7ce24ebfc901e26"),
        ),
        (File("model.pt", 665_389_764), File("config.json")),
    ),
    _tokenizer(
        "CV8x8x8-720p",
        "Cosmos-1.0-Tokenizer-CV8x8x8",
        105_653_696,
        File("autoencoder.jit", 211_307_436, "7f658580d5cf617ee1a1da85b1f51f0d"),
        (
            File("encoder.jit", 85_829_752, "f5834d03645c379bc0f8ad14b9bc0299"),
            File("decoder.jit", 125_477_684, "ff21a63ed817ffdbe4b6841111ec79a8"),
        ),
        (
            File("model.pt", 633_922_176),
            File("mean_std.pt", 2_048, "f07680ad7eefae57d698778e2a0c7c96"),
            File("image_mean_std.pt", 128, "9f19fd3312fc1198e4905ada02e68bce"),
            File("config.json"),
        ),
    ),
    _tokenizer(
        "CV4x8x8-360p",
        "Cosmos-1.0-Tokenizer-CV4x8x8-LowRes",
        110_208_816,
        File("autoencoder.jit", 220_417_676),
    ),
    _tokenizer(
        "DV4x8x8-360p",
        "Cosmos-1.0-Tokenizer-DV4x8x8-LowRes",
        112_619_766,
        File("autoencoder.jit", 226_007_624),
    ),
    _tokenizer(
        "CI8x8-360p",
        "Cosmos-1.0-Tokenizer-CI8x8-LowRes",
        81_384_636,
        File("autoencoder.jit", 162_769_312),
    ),
    _tokenizer(
        "CI16x16-360p",
        "Cosmos-1.0-Tokenizer-CI16x16-LowRes",
        84_334_524,
        File("autoencoder.jit", 168_669_088),
    ),
    _tokenizer(
        "DI8x8-360p",
        "Cosmos-1.0-Tokenizer-DI8x8-LowRes",
        83_599_506,
        File("autoencoder.jit", 167_967_100),
    ),
    _tokenizer(
        "DI16x16-360p",
        "Cosmos-1.0-Tokenizer-DI16x16-LowRes",
        86_549_394,
        File("autoencoder.jit", 173_866_876),
    ),
    _diffusion(
        "7B",
        "Text2World",
        7_236_192_256,
        14_472_385_536,
        "fe9ed68e16cf37b10e7414c9b3ee81e1",
    ),
    _diffusion(
        "7B",
        "Video2World",
        7_236_208_640,
        14_472_418_304,
        "ebcdb19c4c4a6a0e1e0bb65e346f6867",
    ),
    _diffusion(
        "14B",
        "Text2World",
        14_267_149_312,
        28_534_299_648,
        "c69d1c6e51dc78b959040e8c4035a29b",
    ),
    _diffusion(
        "14B",
        "Video2World",
        14_267_169_792,
        28_534_340_608,
        "eaa7aa3678f61d88108c41d7fe201b18",
    ),
    _sample("Text2World-Sample-AV-Multiview", "e3a6ef070deaae0678acd529dc749ea4"),
    _sample("Video2World-Sample-AV-Multiview", "1653f87dce3d558ee01416593552a91c"),
    _sample("SingleToMultiView-Sample-AV"),
    _sample("WorldInterpolator", "48a0bdc99d5e41eee05ba8597c4851da"),
    _flow("2B", 2_059_174_912, 4_118_350_192),
    _flow("14B", 14_368_047_104, 28_736_094_576),
    _other(
        _DECODER,
        "diffusion decoder",
        tuple(DECODERS.values()),
        (
            File("model.pt", 14_474_515_456, "a30149cc3730f3142b01fd374b6076f8"),
            File("aux_vars.pt", 1_049_600, "29e450d81839e82bb4bdbf12e43a74f1"),
        ),
        parameters=7_237_257_216,
        needs=(_CONTINUOUS,),
    ),
    _other(
        _GUARDRAIL,
        "guardrail",
        (_GUARDRAIL, f"nvidia/{_GUARDRAIL}", "Cosmos-1.0-Guardrail"),
        (
            File(
                "video_content_safety_filter/safety_filter.pt",
                2_906_156,
                "b46dc2ad821fc3b0d946549d7ade19cf",
            ),
            File("face_blur_filter/Resnet50_Final.pth", 109_406_920),
        ),
    ),
    _other(
        _PROMPT_GUARDRAIL,
        "guardrail",
        ("meta-llama/Llama-Guard-3-8B",),
        (),
        LLAMA_LICENCE,
        (("*.safetensors", "config.json"),),
    ),
    _other(
        "Qwen3Guard-Gen-0.6B",
        "guardrail",
        ("Qwen/Qwen3Guard-Gen-0.6B",),
        (),
        APACHE_LICENCE,
        (("*.safetensors", "config.json"),),
    ),
    _other(
        "Cosmos-UpsamplePrompt1-12B-Text2World",
        "prompt upsampler",
        ("Cosmos-UpsamplePrompt1-12B-Text2World", "Cosmos-1.0-Prompt-Upsampler-12B-Text2World"),
        (File("model.pt", md5="52d7a6b8b1ac44d856b4c1ea3f8c8c74"),),
        layouts=(("model.pt",), ("*.safetensors", "config.json")),
    ),
    _other(
        "Pixtral-12B",
        "prompt upsampler",
        ("Pixtral-12B", "mistral-community/pixtral-12b"),
        (File("model.pt"), File("config.json")),
        APACHE_LICENCE,
        (("model.pt", "config.json"), ("*.safetensors", "config.json")),
    ),
    _other(
        _T5,
        "text encoder",
        (_T5,),
        (File("pytorch_model.bin", md5="f890878d8a162e0045a25196e27089a3"),),
        APACHE_LICENCE,
        (("pytorch_model.bin",), ("model.safetensors",), ("model*.safetensors",)),
    ),
    _other(
        "Cosmos-Reason1-7B",
        "text encoder",
        ("Cosmos-Reason1-7B", "nvidia/Cosmos-Reason1-7B"),
        (),
        layouts=(("*.safetensors", "config.json"),),
    ),
)


def find(folder: str) -> Entry | None:
    """Return the entry of this name, or whose folder has it, of any generation; None for none.

    A post-trained model, such as "…_post-trained" or "…_post-trained-4gpu_80gb", is an instance of
    the one that it was made from.
    """
    released = folder.partition("_post-trained")[0]
    asked = {folder, released}
    return next((e for e in ENTRIES if asked & {e.name, *e.folders}), None)


def advice(folder: str) -> str:
    """Return what to tell someone who names a folder that is not there; "" for nothing."""
    if (entry := find(folder)) is not None:
        if not entry.command and entry.family.startswith(_WORLDS):
            return f"; this version does not run {entry.name}: see `worldline models`"
        if "_post-trained" in folder:
            return f"; it is what post-training makes of {entry.name}"
        runs = f", and `worldline {entry.command}` runs it" if entry.command else ""
        return f"; `worldline checkpoints download {folder}` fetches it{runs}"
    return did_you_mean(folder, [name for entry in ENTRIES for name in entry.folders], 0.8)


def is_bundled(name: str) -> bool:
    """Tell whether this is the name of a model that ships with the package."""
    return name.startswith(BUNDLED_PREFIX)
