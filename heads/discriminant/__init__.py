"""Linear discriminant analysis: every shrinkage of a fold from one decomposition."""
