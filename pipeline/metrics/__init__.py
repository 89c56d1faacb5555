"""What is measured of answers, by the names of evaluate.metrics."""

METRICS = {
    "accuracy": "pipeline.metrics.accuracy:Accuracy",
    "attentive_probe": "pipeline.metrics.probe:AttentiveProbe",
    "clip_score": "pipeline.metrics.clip_score:CLIPScore",
    "probe": "pipeline.metrics.probe:Probe",
    "things": "pipeline.metrics.things:NamedThings",
    "zero_shot": "pipeline.metrics.zero_shot:ZeroShot",
}
