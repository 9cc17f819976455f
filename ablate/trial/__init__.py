"""One trial from inside: identity, what is measured, the pulse; no torch."""
