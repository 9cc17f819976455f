"""Training data: shards by index, the order of samples, decoding, augmentation, what is kept."""
