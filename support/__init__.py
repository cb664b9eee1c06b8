"""Plumbing that no lecture opens. Each file has one purpose and imports nothing of the method: what it needs is
passed."""
