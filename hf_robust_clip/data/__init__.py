"""Image-caption data for training a CLIP: decoding, collation, sampling, and an embedded dataset."""
