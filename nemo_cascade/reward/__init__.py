"""Graders that several domains share: sandboxed code, math equivalence, instruction checkers, schemas, judges,
repositories.
"""
