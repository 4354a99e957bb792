"""From an image and a prompt to a video. Imports nothing of training."""
