"""Measures of video quality."""
