"""From text to batches: corpora, token shards, packing, loading."""
