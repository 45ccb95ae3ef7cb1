"""Repositories of released software rows: their fields, their checkout, the tools on it, and the verdict."""
