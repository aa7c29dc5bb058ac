"""What people take for weights of worlds: other models by names of tensors, other formats."""

import re
from collections.abc import Iterable

# what a file is -> names that it has, all of them; behind "-", one that it has not. The first fits.
KNOWN = {
    "an action-conditioned model": ("action_embedder",),
    "a multi-view model": (r"(adaln_)?view_(embedd|proj)|traj_embeddings\.|cross_view_attn",),
    "a model of Cosmos-Transfer": (
        r"control(net)?_blocks\.|control_embedder\.|input_hint_block\.|zero_blocks\.",
    ),
    "a transformer of Cosmos-Predict2": (
        r"(x_embedder\.proj\.1|patch_embed\.proj)\.",
        r"blocks\.0\.self_attn\.q_proj\.|transformer_blocks\.0\.attn1\.norm_q\.",
        r"-(crossattn_proj|learnable_pos_embed)\.",
    ),
    "a transformer of Wan": (r"time_projection\.1\.|condition_embedder\.time_proj\.",),
    "a transformer of Flux or HunyuanVideo": (r"(double|single_transformer)_blocks\.0\.",),
    "a U-Net of SD or SDXL": (r"input_blocks\.0\.0\.|down_blocks\.0\.resnets\.", "time_embed"),
    "a tokenizer of images": (r"encoder\.down\.0\.block\.0\.",),
    "a video tokenizer (of `worldline tokenize`)": (
        r"encoder\.(conv_in\.(0\.conv3d|conv_s|weight)|downsamples\.0\.residual)",
    ),
    "a T5 or a model like it": (r"encoder\.block\.0\.layer\.0\.SelfAttention\.",),
    "a vision-language model, such as Cosmos-Reason1": (r"visual\.(blocks\.0|merger)\.",),
    "a language model": (r"layers\.0\.self_attn\.q_proj\.",),
}

# how files begin that are given for weights -> what they are
_FORMATS = {
    rb"GGUF": "GGUF",
    rb"\x89HDF\r\n": "HDF5",
    rb".{4}TFL3": "TensorFlow Lite",
    rb"\x08[\x01-\x20]\x12.(pytorch|tf2onnx|onnx)": "ONNX",
    rb"\x93NUMPY": "a NumPy array",
    rb".{257}ustar": "a tar archive, as .nemo is",
    rb"\x1f\x8b": "a gzip archive",
    rb"\x28\xb5\x2f\xfd": "a zstd archive",
    rb"\xfd7zXZ": "an xz archive",
    rb"7z\xbc\xaf": "a 7z archive",
    rb"Rar!": "a RAR archive",
    rb".{4}ftyp|\x1aE\xdf\xa3": "a video",
    rb"\x89PNG|\xff\xd8\xff|GIF8|RIFF": "a picture",
    rb"%PDF": "a PDF",
}
BESIDE_WEIGHTS = ("a video", "a picture", "a PDF")  # often in a folder of weights


def find_known(names: Iterable[str]) -> str:
    """What tensors of these names are, in words; "" where that is not known."""
    text = "\n".join(names)
    for kind, patterns in KNOWN.items():
        found = {p: re.search(rf"(^|\.)({p.removeprefix('-')})", text, re.M) for p in patterns}
        if all((match is None) == p.startswith("-") for p, match in found.items()):
            return kind
    return ""


def foreign(head: bytes) -> str:
    """Format of a file that holds no weights for us, by its first 512 bytes; "" if unknown."""
    kinds = (kind for start, kind in _FORMATS.items() if re.match(start, head, re.DOTALL))
    return next(kinds, "")
