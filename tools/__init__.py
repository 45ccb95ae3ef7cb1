"""Checks and measurements of the repository itself; nothing here is installed."""
