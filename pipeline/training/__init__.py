"""The one training loop, its checkpoints, and the two runs that it makes: pre-training and fine-tuning."""
