"""OpenAI's fine-tuning API over the same jobs."""
