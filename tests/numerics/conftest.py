"""One rank and one tiny random model for the comparisons with independent implementations."""

from tests.nano_model import config, layout, model

__all__ = ["config", "layout", "model"]
