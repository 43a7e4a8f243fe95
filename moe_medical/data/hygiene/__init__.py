"""Duplicates, near-duplicates and train/test overlap: found over a whole mixture, dropped on demand."""

from moe_medical.data.hygiene.compare import (
    Comparison,
    Duplicates,
    Overlaps,
    compare,
    find_duplicates,
    find_overlaps,
    leaking_rows,
)
from moe_medical.data.hygiene.drop import Drop, choose_drops, hygiene_key, needs_comparison, rows_to_drop

__all__ = [
    "Comparison",
    "Drop",
    "Duplicates",
    "Overlaps",
    "choose_drops",
    "compare",
    "find_duplicates",
    "find_overlaps",
    "hygiene_key",
    "leaking_rows",
    "needs_comparison",
    "rows_to_drop",
]
