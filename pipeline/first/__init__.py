"""`terraalign try` and `init`: what is in a folder of pictures, and a profile that fits it."""
