"""Find the two failures that the released table of the autoregressive models counts.

*Collapse*: the picture, or most of it, turns into one flat colour. *Appearance*: a large object is there from one moment to
the next, though it was nowhere before and did not come in over the border. A still video, small
artifacts, blocky pictures, fast motion, a panning camera and a change of light are not failures.

Both detectors look at a copy of about 48 x 72 pixels, so that the size of a video does not matter.
"""
