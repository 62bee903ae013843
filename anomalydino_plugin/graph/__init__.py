"""The method in operations that ``torch.export`` can trace with any batch, height and width.

The modules beside this package are exact and fast in eager mode, but go through Pillow, SciPy and OpenCV. Here every
stage is written a second time with torch operations alone, on sizes that may be symbols, so that exported graphs carry
resizing, masking, the bank and the anomaly map. Tests hold the two to each other stage by stage.
"""
