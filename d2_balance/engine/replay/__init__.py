"""Runs a saved batch again."""
