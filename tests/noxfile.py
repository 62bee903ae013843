"""The tests that meet anomalib, at both ends of the supported range: ``make test-anomalib``.

Each session makes its own virtual environment (some minutes and several GB); the default run of the tests uses the
pinned version.
"""

import nox

LOWEST, HIGHEST = "2.6.0", "2.7.0"
TESTS = ["engine_few_shot", "engine_batched", "life_cycle", "conformance", "export", "thresholds_in_anomalib"]


@nox.session
@nox.parametrize("anomalib", [LOWEST, HIGHEST])
def anomalib(session: nox.Session, anomalib: str) -> None:
    session.chdir("..")
    session.install("-c", "constraints.txt", "-e", ".[dev]")
    session.install("--no-deps", f"anomalib=={anomalib}")
    session.run("pytest", *(f"tests/integration/test_{name}.py" for name in TESTS), *session.posargs)
