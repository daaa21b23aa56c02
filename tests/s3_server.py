"""A server that speaks S3 for tests: moto's, one request at a time, so that a conditional write is one step as on S3.

`python s3_server.py`, with a Python that has moto[server] (locks/moto.txt): prints its port, serves until it is
killed. Its content is in memory.
"""

import sys

from moto.server import DomainDispatcherApplication, create_backend_app  # type: ignore[import-not-found,unused-ignore]
from werkzeug.serving import make_server  # type: ignore[import-not-found,unused-ignore]


def main() -> None:
    """Serve."""
    application = DomainDispatcherApplication(create_backend_app)
    server = make_server("127.0.0.1", 0, application, threaded=False)
    with server:
        print(server.server_port, flush=True)
        server.serve_forever()


if __name__ == "__main__":
    sys.exit(main())
