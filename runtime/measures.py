"""Measures of class-incremental learning.

`matrix` holds accuracies: its row t is a_{t,1}, .., a_{t,t}, the test accuracies of tasks 1..t
after task t, in percent.
"""


def average_incremental_accuracy(matrix):
    """The mean over t of the mean over i <= t of a_{t,i}, in percent (iCaRL, Rebuffi et al. 2017)."""
    return sum(sum(row) / len(row) for row in matrix) / len(matrix)


def forgetting(matrix):
    """The mean over i < T of max_{i <= t < T} a_{t,i} - a_{T,i}, in points (Chaudhry et al. 2018).

    Negative where old tasks gained; None with a single task, which cannot be forgotten.
    """
    last = matrix[-1]
    drops = [
        max(matrix[state][task] for state in range(task, len(matrix) - 1)) - last[task]
        for task in range(len(last) - 1)
    ]
    return sum(drops) / len(drops) if drops else None


def backward_transfer(matrix):
    """The mean over i < T of a_{T,i} - a_{i,i}, in points (Lopez-Paz & Ranzato 2017); None as above."""
    last = matrix[-1]
    gains = [last[task] - matrix[task][task] for task in range(len(last) - 1)]
    return sum(gains) / len(gains) if gains else None
