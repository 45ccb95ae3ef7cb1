"""Every parser of what a model, a judge or a server writes, under any input: `python -m tools.fuzz`."""
