"""What is asked of pictures, by the names of data.<name>.task."""

TASKS = {
    "caption": "pipeline.tasks.captioning:Captioning",
    "classify": "pipeline.tasks.naming:Naming",
}
