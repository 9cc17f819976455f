"""Files that survive: atomic JSON, the study folder, text written by people, secrets."""
