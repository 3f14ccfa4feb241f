"""Sources of images: folders, tables, archives and arrays, read by one reader that counts all."""
