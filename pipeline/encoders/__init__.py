"""Frozen vision encoders, by the names of vision.encoder."""

ENCODERS = {
    "efficientnet_lite0": "pipeline.encoders.lite0:Lite0",
    "open_clip": "pipeline.encoders.open_clip:OpenClip",
    "timm": "pipeline.encoders.timm:Timm",
}
