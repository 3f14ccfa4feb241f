"""Model directories: a head, an ensemble or a fine-tuned network that predicts from images."""
