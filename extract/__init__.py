"""Images to features: sources of images, backbones, their taps, and the work units that
run them.
"""
