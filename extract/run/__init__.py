"""The extraction of one work unit: decode ahead, forward pass, publish a shard per feature set."""
