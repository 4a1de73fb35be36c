"""The mathematics of the paper: pure functions of tensors. Imports torch only."""
