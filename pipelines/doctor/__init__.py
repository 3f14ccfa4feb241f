"""The checks of `headrace doctor`, which show whether runs will work on this machine."""
