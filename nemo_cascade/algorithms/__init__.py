"""Pure functions of the algorithms, without model, process group or state: advantage, losses, kept sets, KL."""
