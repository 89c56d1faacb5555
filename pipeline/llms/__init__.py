"""Frozen language models, by the names of llm.loader."""

LOADERS = {"huggingface": "pipeline.llms.huggingface:HuggingFace", "gguf": "pipeline.llms.gguf:GGUF"}
