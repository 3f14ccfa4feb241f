"""The plan of a run: which features and heads it has, which it lacks, and what those cost."""
