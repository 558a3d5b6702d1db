"""Evaluators: each `(model, processor) -> dict[str, float]`, by itself or inside a trainer."""
