"""Frozen models behind two small Protocols: vision encoders and language models."""
