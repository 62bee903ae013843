"""The Ray layer behind the console script ``anomalydino``; import nothing from here, use the script."""

__all__: list[str] = []
