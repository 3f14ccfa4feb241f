"""scikit-learn on both sides: its estimators as banks, our banks as estimators."""
