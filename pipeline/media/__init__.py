"""Pictures: read from anywhere, decoded, resized and normalised; and the look of plots."""
