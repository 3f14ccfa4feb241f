"""The stages of a run: each takes the run state and returns the next one."""
