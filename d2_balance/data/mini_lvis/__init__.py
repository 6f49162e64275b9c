"""The built-in long-tailed dataset."""
