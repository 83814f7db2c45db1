"""Settings that every test shares."""

import os

# Toy models are fastest on one thread, and the suite itself runs on every core (pytest -n).
os.environ.setdefault("OMP_NUM_THREADS", "1")
