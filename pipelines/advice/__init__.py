"""Advice on what would help most: more images, fine-tuning, or neither."""
