"""Counts the crashes that left no dump, from the kernel log (docs/operations.md, "What is counted")."""
