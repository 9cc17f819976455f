"""Logistic regression on handwritten digits, as plain as a script can be: no torch, no ablate.

Prints one line of JSON a pass over the data, and its accuracy on digits it has not seen.
"""

import argparse
import json

import numpy as np
from sklearn.datasets import load_digits
from sklearn.linear_model import SGDClassifier
from sklearn.metrics import log_loss
from sklearn.model_selection import train_test_split

parser = argparse.ArgumentParser()
parser.add_argument("--lr", type=float)
parser.add_argument("--penalty", type=float)
parser.add_argument("--epochs", type=int)
parser.add_argument("--seed", type=int)
args = parser.parse_args()

images, labels = load_digits(return_X_y=True)
train_x, test_x, train_y, test_y = train_test_split(
    images / 16, labels, test_size=0.4, random_state=0
)
model = SGDClassifier(
    loss="log_loss", learning_rate="constant", eta0=args.lr, alpha=args.penalty,
    random_state=args.seed,
)  # fmt: skip
order = np.random.default_rng(args.seed)
for epoch in range(1, args.epochs + 1):
    rows = order.permutation(len(train_x))
    model.partial_fit(train_x[rows], train_y[rows], classes=range(10))
    loss = log_loss(train_y, model.predict_proba(train_x))
    print(json.dumps({"step": epoch, "loss": loss}))
print(json.dumps({"eval": True, "accuracy": model.score(test_x, test_y)}))
