"""LeRobot data sets, v2.0, v2.1 and v3.0: episodes of one camera, and their tasks; needs no torch.

Source of the layouts: huggingface/lerobot `src/lerobot/datasets/utils.py` and `dataset_metadata.py`
at 7427f31, and of v2.1 the constants that they keep for conversion.
"""
