"""A local page: the model on one's own photos, what it looked at, where it errs, and what all runs came to."""
