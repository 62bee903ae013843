import anomalydino_plugin


def test_every_public_name_exists_and_nothing_else_is_listed():
    assert set(anomalydino_plugin._HOMES) <= set(anomalydino_plugin.__all__)
    for name in anomalydino_plugin.__all__:
        value = getattr(anomalydino_plugin, name)
        assert getattr(value, "__name__", name) == name
        assert value.__doc__, name


def test_unknown_names_are_attribute_errors():
    assert not hasattr(anomalydino_plugin, "AnomalyDINO")  # anomalib's name stays anomalib's
