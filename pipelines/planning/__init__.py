"""What a run has, what it lacks, and what that costs."""
