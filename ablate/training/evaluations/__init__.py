"""Evaluations: named measurements of a model, run by all ranks together on their own schedule.

Each is a small object with a name, ``due(epoch)`` and ``run(model, gang)`` (the Evaluation of
ablate.recipes). It shares its images out over the ranks, gives every rank the same numbers, and
leaves the model, its buffers and all generators as they were, so that measuring more or less
often changes no training.
"""
