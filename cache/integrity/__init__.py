"""Checksums, verification, repair and garbage collection of feature sets."""
