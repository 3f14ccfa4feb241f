"""The checks of `headrace doctor`: is this machine fit for a run?"""
