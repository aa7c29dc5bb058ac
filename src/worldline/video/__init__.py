"""Media in and out: files to uint8 frames, frames to files, and the ranges in between.

`read` and `write` need no torch; `convert` is where uint8 becomes [-1, 1] and back, and only there.
"""
