"""From tasks to scored groups: samplers (local, remote), the server, and the collector that plays domains with them."""
