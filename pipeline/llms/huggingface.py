"""HuggingFace."""

from pipeline.llms.base import Loader


class HuggingFace(Loader):
    """HuggingFace."""
