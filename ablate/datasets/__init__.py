"""Preparing data: the index over WebDataset shards, and the small real dataset."""
