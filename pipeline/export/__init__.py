"""What is trained, as folders that other programs read without TerraAlign."""
