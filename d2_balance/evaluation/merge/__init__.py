"""Merging and re-scoring of prediction files."""
