"""`terraalign plan`: what running the graph takes, from short measurements on this machine."""
