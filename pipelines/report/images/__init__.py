"""Sections about all images of a run: their map, slices of them, their quality."""
