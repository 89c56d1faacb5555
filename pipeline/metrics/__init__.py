"""What is measured of answers, by the names of evaluate.metrics."""

METRICS = {
    "accuracy": "pipeline.metrics.accuracy:Accuracy",
    "attentive_probe": "pipeline.metrics.probe:AttentiveProbe",
    "caption_scores": "pipeline.metrics.caption_scores:CaptionScores",
    "clip_score": "pipeline.metrics.clip_score:CLIPScore",
    "judge": "pipeline.metrics.judge:Judge",
    "probe": "pipeline.metrics.probe:Probe",
    "things": "pipeline.metrics.things:NamedThings",
    "zero_shot": "pipeline.metrics.zero_shot:ZeroShot",
}
