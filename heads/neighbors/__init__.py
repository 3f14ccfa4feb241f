"""Heads that need no training: nearest neighbors and nearest class means."""
