"""Augmentation of image batches and of captions."""
