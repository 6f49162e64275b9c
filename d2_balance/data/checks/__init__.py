"""Checks of annotation files and images before training."""
