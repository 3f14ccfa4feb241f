"""The page that a report is: plain values, charts, small pictures, and one HTML file of them."""
