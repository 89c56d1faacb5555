"""`terraalign doctor`: what the parts of a profile need, and whether it is there."""
