"""The results of a profile: for machines (metrics.json), for the terminal, and as one page for people."""
