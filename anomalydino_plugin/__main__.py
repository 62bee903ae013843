"""anomalib's command line with our models registered: ``python -m anomalydino_plugin benchmark --config FILE``.

``anomalib fit | test | predict | export`` find our models by their dotted name and need none of this. ``benchmark``
builds models through ``get_model``, which must be told first.
"""

from anomalib.cli.cli import main

from anomalydino_plugin.registration import register

if __name__ == "__main__":
    register()
    main()
