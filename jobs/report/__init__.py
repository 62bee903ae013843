"""``anomalydino report``: a finished run as one HTML file."""
