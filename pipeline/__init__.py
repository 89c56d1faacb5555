"""TerraAlign: cached image tokens, adapters aligned by Earth Mover's Distance, QLoRA fine-tuning."""
