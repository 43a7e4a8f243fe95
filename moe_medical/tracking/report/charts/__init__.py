"""The pictures of a report, by subject; each function gives an altair chart, or None without data."""
