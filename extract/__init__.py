"""Images to features: sources of images, backbones, taps, and the work units that run them."""
