"""``anomalydino reproduce``: the paper's protocol on the categories at hand, beside the paper's figures."""
