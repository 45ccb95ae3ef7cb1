"""One rank, one tiny random model for all tests of the models package."""

from tests.nano_model import config, layout, model

__all__ = ["config", "layout", "model"]
