"""Digests and checks: verify and repair feature sets, remove what nobody needs."""
