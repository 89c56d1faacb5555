"""`terraalign doctor`: what the parts of a profile need, and what it costs."""
