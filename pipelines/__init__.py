"""From a recipe to a selected model: runs, their files, and the commands on them."""
