"""Advice: train a head, fine-tune deeper, train from scratch, or collect more images."""
