"""GGUF."""

from pipeline.llms.base import Loader


class GGUF(Loader):
    """GGUF."""
