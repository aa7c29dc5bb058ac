"""Checks of prompts and of videos, and the blurring of faces, as the released models have them."""
