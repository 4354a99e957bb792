"""The mathematics of flow matching, as pure functions of tensors. Imports torch only: no config, no rank, no model."""
