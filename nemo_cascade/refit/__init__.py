"""Bringing the Learner's weights to the Sampler. A refit carries a version and ends with a checksum that both sides
computed.
"""
