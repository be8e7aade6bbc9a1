"""Text to token ids to batches: documents, tokenizer, shards, the shuffled stream."""
