"""Measures of class-incremental learning.

matrix: row t holds a_{t,1}, .., a_{t,t}, the test accuracies of tasks 1..t after task t (percent).
"""

from statistics import mean

DEFINITIONS = {
    "last accuracy": "the mean over i of a_{T,i}, after the last task T",
    "average incremental accuracy (AIA)": "the mean over t of the mean over i <= t of a_{t,i} "
    "(iCaRL, Rebuffi et al. 2017)",
    "forgetting": "the mean over i < T of max_{i <= t < T} a_{t,i} - a_{T,i}, in percentage "
    "points; negative where old tasks gained (Chaudhry et al. 2018)",
    "backward transfer (BWT)": "the mean over i < T of a_{T,i} - a_{i,i}, in percentage points: "
    "what later tasks changed (Lopez-Paz & Ranzato 2017)",
    "task-aware accuracy": "as a_{T,i}, but each image is classified by the heads of its own task "
    "alone, among that task's classes",
    "recency": "the percentage of all test images that are classified as a class of the last task "
    "T; without bias it is that task's share of them, 100 / T for tasks of equal size. It shows "
    "task-recency bias, which Masana et al. (2022) describe",
}


def average_incremental_accuracy(matrix):
    """See DEFINITIONS; in percent."""
    return mean([mean(row) for row in matrix])


def forgetting(matrix):
    """See DEFINITIONS; in percentage points. None with a single task, which cannot be forgotten."""
    *before, last = matrix
    drops = [max(row[i] for row in before[i:]) - last[i] for i in range(len(before))]
    return mean(drops) if drops else None


def backward_transfer(matrix):
    """See DEFINITIONS; in percentage points. None with a single task."""
    *before, last = matrix
    gains = [last[i] - row[i] for i, row in enumerate(before)]
    return mean(gains) if gains else None
