"""The cascade as one object: its graph and plan, content keys, folders, the runner, and what the ledger decides.

Nothing here imports torch: a stage is started as a process by module name.
"""
