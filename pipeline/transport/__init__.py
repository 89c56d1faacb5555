"""Exact Earth Mover's Distance and its gradient, in the order of docs/emd.md."""
