"""The trainers: subclasses of `transformers.Trainer` that differ only in what their papers add."""
