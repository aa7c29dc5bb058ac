"""Released checkpoints: opened by header, renamed, streamed into modules, saved."""
