"""The solver of logistic banks: many convex problems on the same rows, side by side."""
