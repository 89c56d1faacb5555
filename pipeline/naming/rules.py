"""The ways of naming."""

RULES = ("emd", "discriminant", "namer")  # without the LLM; namer: both together
LLM_RULES = ("ranked", "calibrated", "combined", "state")
"""combined: the LLM's and the namer's; state: a classifier in place of the LLM's output layer."""
