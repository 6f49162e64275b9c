"""What changes scores after training."""
