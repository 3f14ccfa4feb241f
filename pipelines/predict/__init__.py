"""Predictions of many images as a table."""
