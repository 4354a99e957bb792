"""Estimates memory, messages and time of a layout of the DiT by arithmetic alone, without torch."""
