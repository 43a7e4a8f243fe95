"""The pictures of a report, one module per subject; each function gives altair charts or None without data."""
