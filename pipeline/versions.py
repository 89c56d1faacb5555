"""Versions of what the extractions write. DVC watches this file: raise one where a change alters the bytes."""

IMAGES = 4  # 2: transparency over white, 16-bit grey scaled; 3: one thread a forward pass; 4: declared bits scaled
DECODERS = 1  # of decoders other than PIL
VIEWS = 1  # of pictures, beside the plain one
TEXT = 2
