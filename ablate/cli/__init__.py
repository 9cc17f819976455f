"""The door: verbs, options, what the terminal shows; no logic."""
