"""Datasets in Detectron2's catalog; importing it registers the built-in ones."""

from ..mini_lvis.dataset import register_mini_lvis

register_mini_lvis()
