"""Every error this library raises on purpose.

    AnomalyDINOError
    ├── ConfigError   a setting that cannot be honoured (also a ValueError)
    ├── InputError    data that cannot be processed (also a ValueError)
    │   └── ImageError    one image that cannot be decoded or is too small
    ├── WeightsError  backbone weights missing, damaged or of another model
    ├── BankError     a memory bank that is empty, damaged or made with other settings
    └── ResourceError memory or open files ran out, or a folder cannot be written (also an OSError)

Each message says what was given, what was expected and what to do.
"""


class AnomalyDINOError(Exception):
    """Base of all errors raised on purpose by this library."""


class ConfigError(AnomalyDINOError, ValueError):
    """A setting is out of range, unknown, or contradicts another."""


class InputError(AnomalyDINOError, ValueError):
    """The data given cannot be processed as a whole."""


class ImageError(InputError):
    """One image cannot be decoded, or is too small for one patch."""


class WeightsError(AnomalyDINOError):
    """Backbone weights are missing, damaged, or belong to another model."""


class BankError(AnomalyDINOError):
    """A memory bank is empty, damaged, or was built with other settings."""


class ResourceError(AnomalyDINOError, OSError):
    """What the machine has to give ran out: memory, disk space, open files; or a folder cannot be written."""
