"""The area under the ROC curve: how often a random "yes" is given a higher score than a random "no".

    scores   0.1  0.4  0.4  0.8         ranks  1  2.5  2.5  4        ties share the mean of their ranks
    targets  no   no   yes  yes         U = (2.5 + 4) - 2 · 3 / 2 = 3.5        AUC = U / (2 · 2) = 0.875

Exact: by the ranks of all scores of all ranks of the mesh, not by a histogram. 0.5 is guessing, 1 is perfect.
Reference: Hanley and McNeil, "The meaning and use of the area under a ROC curve", Radiology 143, 1982.
"""

import math

import numpy as np

from dtrain.arrays import Array


def auc(scores: Array, targets: Array) -> float:
    """Scores (n,), targets (n,) of 0 and 1; NaN where one of the two classes is missing."""
    _, places, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[places]
    yes = targets == 1
    positives, negatives = int(np.count_nonzero(yes)), int(np.count_nonzero(~yes))
    if not positives or not negatives:
        return math.nan
    return float((ranks[yes].sum() - positives * (positives + 1) / 2) / (positives * negatives))
