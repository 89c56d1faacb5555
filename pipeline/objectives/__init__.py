"""What pre-training minimises, by the names of pretrain.objective.name."""

OBJECTIVES = {
    "emd": "pipeline.objectives.emd:EMD",
    "caption_ce": "pipeline.objectives.caption_ce:CaptionCE",
    "qformer": "pipeline.objectives.qformer:QFormer",
    "mmd": "pipeline.objectives.mmd:MMD",
    "sinkhorn_divergence": "pipeline.objectives.sinkhorn_divergence:SinkhornDivergence",
    "bag_of_words": "pipeline.objectives.bag_of_words:BagOfWords",
}
