"""What the engine has of its own for a CPU."""
