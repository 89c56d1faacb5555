"""Data sets of every layout, by the names of data.<name>.source."""

SOURCES = {
    "coco": "pipeline.sources.coco:Coco",
    "food101": "pipeline.sources.food101:Food101",
    "imagefolder": "pipeline.sources.imagefolder:ImageFolder",
    "table": "pipeline.sources.table:Table",
    "webdataset": "pipeline.sources.tars:Tars",
    "openmoji_scenes": "pipeline.sources.openmoji:Scenes",
    "openmoji_food": "pipeline.sources.openmoji:Food",
}
