"""Finding what nobody named: suspect pairs of a dataset, and suspect models."""
