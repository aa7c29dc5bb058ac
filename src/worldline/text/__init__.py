"""Prompts to the context that a world's networks attend to."""
