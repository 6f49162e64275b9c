"""Counts of foreground and background before training."""
