"""``python -m ablate.cli``."""

from ablate.cli.app import main

if __name__ == "__main__":
    main()
