"""Tested runs side by side, the choice of a threshold, and speed."""
