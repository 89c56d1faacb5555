"""What pre-training minimises, by the names of pretrain.objective.name."""

OBJECTIVES = {
    "emd": "pipeline.objectives.emd:EMD",
    "caption_ce": "pipeline.objectives.caption_ce:CaptionCE",
    "qformer": "pipeline.objectives.qformer:QFormer",
}
