"""Heads on bags: one prediction for all images of a unit, pooled by attention, mean or maximum."""
