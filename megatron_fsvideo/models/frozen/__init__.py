"""Networks that are used as they come: perceptual trunks, I3D, DINOv2, text and image encoders."""
