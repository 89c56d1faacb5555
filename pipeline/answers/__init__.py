"""What is trained, for use: which adapter answers, how, and whether a picture is like those it knows."""
