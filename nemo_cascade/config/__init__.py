"""Every knob, once: the dataclasses of `schema`, read from YAML by `load`, strict about unknown keys."""
