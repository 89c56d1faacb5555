"""What is measured, by the names of evaluate.metrics; and where image tokens lie among the words (alignment)."""

METRICS = {
    "accuracy": "pipeline.metrics.accuracy:Accuracy",
    "probe": "pipeline.metrics.probe:Probe",
    "things": "pipeline.metrics.things:NamedThings",
}
