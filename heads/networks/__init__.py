"""Heads that are small neural networks: perceptrons and convolutions, trained side by side."""
