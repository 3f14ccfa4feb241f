"""Features to trained heads: banks, their results, and how good they are."""
