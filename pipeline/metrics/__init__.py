"""What is measured of answers, by the names of evaluate.metrics."""

METRICS = {
    "accuracy": "pipeline.metrics.accuracy:Accuracy",
    "caption_scores": "pipeline.metrics.caption_scores:CaptionScores",
    "probe": "pipeline.metrics.probe:Probe",
    "things": "pipeline.metrics.things:NamedThings",
    "judge": "pipeline.metrics.judge:Judge",
}
