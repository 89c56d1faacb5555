"""What pre-training minimises, by the names of pretrain.objective.name."""

OBJECTIVES = {"emd": "pipeline.objectives.emd:EMD"}
