"""Released checkpoints: opened by header, renamed, streamed into modules, saved."""

from worldline.weights.inspect import Summary, describe
from worldline.weights.keymap import KeyMap, match
from worldline.weights.read import Checkpoint, open_checkpoint
from worldline.weights.shards import find_shards, open_shards
from worldline.weights.source import TensorInfo
from worldline.weights.stream import load_into
from worldline.weights.write import save, save_module

__all__ = [
    "Checkpoint",
    "KeyMap",
    "Summary",
    "TensorInfo",
    "describe",
    "find_shards",
    "load_into",
    "match",
    "open_checkpoint",
    "open_shards",
    "save",
    "save_module",
]
