"""Moto's S3 on loopback, one request at a time, so that a conditional put is as atomic as a real store's. Run by `.venv-s3`'s Python alone.

In: nothing. Out: its port on the first line of stdout; it ends when stdin closes. Runs in: its own process (tests/s3_server.py).
"""

import io
import logging
import os
import sys
import threading

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

logging.getLogger("werkzeug").setLevel(logging.ERROR)
WSGIRequestHandler.protocol_version = "HTTP/1.1"
moto, one_at_a_time = DomainDispatcherApplication(create_backend_app), threading.Lock()


def serial(environ, start_response):
    length = int(environ.get("CONTENT_LENGTH") or 0)
    environ["wsgi.input"] = io.BytesIO(environ["wsgi.input"].read(length))
    with one_at_a_time:
        body = b"".join(moto(environ, start_response))
    return [body]


server = make_server("127.0.0.1", 0, serial, threaded=True)
print(server.server_port, flush=True)
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
server.serve_forever()
