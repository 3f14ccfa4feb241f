"""Detection of a recipe's settings from images and tables, for `headrace init`."""
