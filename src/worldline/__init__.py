"""Run and post-train world foundation models."""
