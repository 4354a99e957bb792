"""What a layout of the DiT costs, before anything is built: memory, messages, time. Arithmetic only: no torch."""
