"""Generates a video from an image and a prompt. Imports nothing of training."""
