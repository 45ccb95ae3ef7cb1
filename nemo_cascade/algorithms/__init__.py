"""Pure functions of the algorithms: no model, no process group, no state. Advantage (equation 1), losses (1 to 4), kept sets, KL."""
