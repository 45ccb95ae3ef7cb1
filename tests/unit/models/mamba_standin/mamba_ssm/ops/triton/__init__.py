"""Stand-in; see ops/triton/ssd_combined.py."""
