"""Make the reduced copy of golden cases that a clone without ../shared tests against.

    python tests/golden/reduce.py ../shared/golden

Whole files are copied; of `io.safetensors` the largest tensors are left out, with their lines.
"""

from __future__ import annotations

import json
import shutil
import sys
from fnmatch import fnmatchcase
from pathlib import Path

from safetensors.torch import load_file, save_file

TARGET = Path(__file__).parent / "cases"
# kind -> patterns of what is left out: files, and tensors of io.safetensors
KEPT: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "ar_12b_like_tiny": ((), ("layer[12]_*", "cache_*", "*_t0.7_*", "real_*_abs_pos_emb")),
    "tok_dv_tiny": (("model.pt",), ("t17.*", "t33.*", "t9.decoder.up.*", "*.reg.*")),
    "tok_losses_tiny": ((), ()),
    "ar_video_io": ((), ("asset_*", "clip_b_9.*", "img_b.*", "clip_a_9.*")),
    "dit_v2w_tiny": ((), ("b2.*",)),
    "edm_res_sampler": (("Cosmos-*",), ("t2w.*", "v2w.*", "net.*")),
    "v2w_denoise_e2e": ((), ("*.traj", "*.10.*")),
    "tok_cv_tiny": (
        ("model.pt",),
        (
            "t17.*",
            "t33.*",
            "t9.decoder.*",
            "t9.encoder.*",
            "*.ema.*",
            "*.reg.*",
            "np.*",
            "norm9x2.*",
            "wav.*",
        ),
    ),
    "t5_tiny": ((), ()),
    "guardrail_llm_decisions": ((), ()),
}


def main(source: Path) -> None:
    shutil.rmtree(TARGET, ignore_errors=True)
    for kind, (files, tensors) in KEPT.items():
        shutil.copytree(
            source / kind, TARGET / kind, ignore=shutil.ignore_patterns(*files, "io.safetensors")
        )
        spec = json.loads((source / kind / "case.json").read_text())
        if (source / kind / "io.safetensors").exists():
            kept = {
                name: tensor
                for name, tensor in load_file(source / kind / "io.safetensors").items()
                if not any(fnmatchcase(name, pattern) for pattern in tensors)
            }
            save_file(kept, TARGET / kind / "io.safetensors")
            spec["tensors"] = {n: line for n, line in spec["tensors"].items() if n in kept}
        if "loads" in spec:
            spec["loads"] = [
                load
                for load in spec["loads"]
                if not load["returned_keys"] or any(n.startswith(load["key"] + ".") for n in kept)
            ]
        spec["reduced"] = f"left out: {', '.join(files + tensors) or 'nothing'}"
        (TARGET / kind / "case.json").write_text(json.dumps(spec, indent=1) + "\n")
    for path in TARGET.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
