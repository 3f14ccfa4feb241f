"""Frozen pretrained networks: where they come from, their weights and nodes."""
