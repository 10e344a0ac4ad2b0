"""Sandbox for code that models write: isolation that is tested at start, and warm processes."""
