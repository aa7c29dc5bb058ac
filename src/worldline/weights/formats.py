"""Formats of files that hold no weights for us, by how they begin."""

import re

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


def foreign(head: bytes) -> str:
    """Format of a file that holds no weights for us, by its first 512 bytes; "" if unknown."""
    kinds = (kind for start, kind in _FORMATS.items() if re.match(start, head, re.DOTALL))
    return next(kinds, "")
