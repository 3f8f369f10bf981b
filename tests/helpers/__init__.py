"""What several tests need: tiny checkpoints, ranks as threads, paged batches."""
