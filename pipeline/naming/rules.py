"""The ways of naming."""

RULES = ("emd", "discriminant", "namer")  # without the LLM; namer: both together
LLM_RULES = ("ranked", "calibrated", "combined")  # combined: the LLM's and the namer's
