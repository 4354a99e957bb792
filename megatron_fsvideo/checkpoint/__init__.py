"""Saving, loading and converting weights; no file that a user was given is ever unpickled."""
