"""`headrace cache …`: list, verify, repair and clean a cache; export and import features."""
