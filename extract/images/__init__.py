"""Image files: where their bytes are, their content hashes, decoding and preprocessing."""
