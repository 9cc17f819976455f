"""``python -m ablate.cluster.keeper FD MODULES``."""

from ablate.cluster.keeper.server import main

main()
