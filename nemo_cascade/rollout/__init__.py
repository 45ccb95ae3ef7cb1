"""From tasks to scored groups: samplers (local, remote, TensorRT-LLM), the collector that plays domains against them,
and records.
"""
