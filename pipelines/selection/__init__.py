"""Choosing among trained heads: the winner, ensembles, corrections for the choice."""
