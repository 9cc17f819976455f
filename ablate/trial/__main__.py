"""``python -m ablate.trial TRIAL_FOLDER``: one rank of a trial."""

import sys

from ablate.trial.worker import main

sys.exit(main(sys.argv[1:]))
