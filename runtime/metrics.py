"""Measures of class-incremental learning.

`matrix` holds accuracies: its row t is a_{t,1}, .., a_{t,t}, the test accuracies of tasks 1..t
after task t, in percent.
"""

import statistics

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


def last_accuracy(matrix):
    """See DEFINITIONS; in percent."""
    return sum(matrix[-1]) / len(matrix[-1])


def average_incremental_accuracy(matrix):
    """See DEFINITIONS; in percent."""
    return sum(sum(row) / len(row) for row in matrix) / len(matrix)


def forgetting(matrix):
    """See DEFINITIONS; in percentage points. None with a single task, which cannot be forgotten."""
    last = matrix[-1]
    drops = [
        max(matrix[state][task] for state in range(task, len(matrix) - 1)) - last[task]
        for task in range(len(last) - 1)
    ]
    return sum(drops) / len(drops) if drops else None


def backward_transfer(matrix):
    """See DEFINITIONS; in percentage points. None with a single task."""
    last = matrix[-1]
    gains = [last[task] - matrix[task][task] for task in range(len(last) - 1)]
    return sum(gains) / len(gains) if gains else None


def recency(confusion, tasks):
    """See DEFINITIONS; in percent. confusion: [[n]], from trainer.evaluate(), after `tasks` tasks.

    None with a single task, which has no older ones.
    """
    if tasks == 1:
        return None
    newest = len(confusion) // tasks
    return 100 * sum(sum(row[-newest:]) for row in confusion) / sum(map(sum, confusion))


def mean_and_sd(values):
    """Mean and sample standard deviation (n - 1) of numbers; of a single number that is None."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None
