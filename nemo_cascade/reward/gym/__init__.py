"""NeMo-Gym's resources-server protocol, from both sides: `client` asks a running server, `service` is one."""
