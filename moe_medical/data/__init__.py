"""Data, in the order it flows: recipe (YAML) -> sources (examples) -> formats (tokens) -> mixture (order)."""
