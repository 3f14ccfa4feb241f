"""Errors of fine-tuning."""
