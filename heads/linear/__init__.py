"""Linear heads: logistic and ridge regression, each a bank on one pass over the rows."""
