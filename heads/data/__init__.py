"""What heads are trained on: rows of features, tasks and their folds."""
