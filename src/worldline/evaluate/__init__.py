"""How good a video is: fidelity to a reference, failures, and how many of many clips fail."""
