"""Running: the Serve application, up for as long as a block lasts, drained when it ends.

In: ServeSettings. Out: the address it answers at. Runs in: the process of `ftcore serve`, the demo.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from ray import serve

from cluster.connect import connect
from ftcore.errors import ClusterError
from serving.app import application
from serving.exposure import require_served
from serving.jobs import SHORT_WAY
from serving.settings import ServeSettings

NAME = "ftcore"
QUIET = {"log_level": "WARNING"}
LAST_S = 60.0
"""How long the replicas may take to end once there are no answers under way."""


@contextmanager
def running(settings: ServeSettings) -> Iterator[str]:
    """Yields `http://host:port` (or `https://`) once every replica is ready. Raises ConfigError for settings that would be unsafe.

    On a cluster that others use, their Serve applications stay; a Ray that was started here ends.
    """
    app = application(settings)
    for name, value in {"RAY_SERVE_LOG_TO_STDERR": "0", **SHORT_WAY}.items():  # a Ray that is started here has them for its proxy, too
        os.environ.setdefault(name, value)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    connection = connect(local_cpus=sum(base.num_cpus * base.replicas.max for base in settings.all_bases.values()) + 1)
    try:
        options = {"host": settings.host, "port": settings.port}
        if settings.tls is not None:
            options |= {"ssl_certfile": settings.tls.cert, "ssl_keyfile": settings.tls.key}
        serve.start(http_options=options, logging_config=QUIET)
        serve.run(app, name=NAME, route_prefix="/", logging_config=QUIET)
        try:
            if settings.tls is not None:
                require_served(settings.tls, settings.host, settings.port)
            yield f"http{'s' if settings.tls else ''}://{settings.host}:{settings.port}"
        finally:
            _drain(settings.drain_s)
            if not connection.started and not serve.status().applications:
                serve.shutdown()  # nobody else's is left
    finally:
        connection.close()


def _drain(seconds: float) -> None:
    """Takes the application down once its answers have ended. Serve's own wait for that gives up after a minute."""
    serve.delete(NAME, _blocking=False)
    until = time.monotonic() + seconds + LAST_S
    while NAME in serve.status().applications:
        if time.monotonic() > until:
            raise ClusterError("the server does not end", got=f"still there after {seconds + LAST_S:g} s", remedy="end its Ray: ray stop")
        time.sleep(0.2)
