"""Data, in the order it flows: recipe (YAML) -> sources (examples) -> tokens -> mixture -> batches."""
