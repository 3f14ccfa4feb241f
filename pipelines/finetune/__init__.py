"""From heads to networks: partial reuse, fine-tuning, training from scratch."""
