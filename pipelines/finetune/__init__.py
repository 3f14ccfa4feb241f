"""Fine-tuning: networks trained by gradients from heads, by partial reuse, or from scratch."""
