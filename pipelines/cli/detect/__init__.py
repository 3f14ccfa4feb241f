"""What images, tables and their pixels say of a recipe, for `headrace init`."""
