"""The feature store: the only place that knows shapes, dtypes and files on disk."""
