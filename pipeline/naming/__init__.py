"""Naming without the language model: by EMD to the names of all classes, and by a classifier on the same tokens."""
