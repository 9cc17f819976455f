"""The only user of optuna: asks it for the cells of a search, and shows it every cell of a study.

A `CellBook` holds the cells of one study: those that are being run and those that have ended. What
it knows comes from the study folder (the controller tells it everything again at each launch), so
nothing is ever read back from Optuna's storage as truth. Two Optuna studies live inside it:

- one in memory (``sampler``), from which cells are proposed; it sees ended cells by their mean,
  running cells as running (so that parallel proposals keep apart), and no proposal that was turned
  down;
- one in the storage (``storage``), an SQLite file or a URL, with one Optuna trial per cell of every
  design, for optuna-dashboard and other readers. Its outage stops nothing and loses nothing.

"Trial" means a cell with one seed everywhere in this project; Optuna's trial is our cell, and the
word with that meaning stays inside this package.
"""
