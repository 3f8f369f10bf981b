"""Worker daemon: one per rank; weights shard, paged KV cache, sharded layers, sampler."""
