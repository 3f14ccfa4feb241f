"""From heads to networks: partial reuse, fine-tuning, training from scratch, for the heads that
promise to pay.
"""
