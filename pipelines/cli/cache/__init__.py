"""`headrace cache …`: what is in a cache, is it whole, repair it, clean it, export from it."""
