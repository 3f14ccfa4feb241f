"""What the numbers mean: selection, paired tests, transfer scores, learning curves, ensembles,
advice.
"""
