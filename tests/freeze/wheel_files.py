"""The wheel named has the package and every bundled file, and nothing else."""

import sys
from pathlib import Path
from zipfile import ZipFile

SOURCE = Path(__file__).resolve().parents[2] / "src"

names = {name for name in ZipFile(sys.argv[1]).namelist() if ".dist-info/" not in name}
wanted = {
    path.relative_to(SOURCE).as_posix()
    for path in (SOURCE / "worldline").rglob("*")
    if path.is_file() and "__pycache__" not in path.parts
}
if names != wanted:
    sys.exit(f"missing: {sorted(wanted - names)}; not of the package: {sorted(names - wanted)}")
print(f"{len(names)} files, {Path(sys.argv[1]).stat().st_size / 1e6:.1f} MB")
