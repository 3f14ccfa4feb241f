"""Taps: nodes of a network, how their outputs are pooled, and the pass that captures them."""
