"""Files, names and distributed helpers."""
