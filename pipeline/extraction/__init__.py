"""From a manifest to features in the store: image tokens, and captions as token ids with their embeddings."""
