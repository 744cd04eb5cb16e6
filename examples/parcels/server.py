"""Takes parcels: POST /parcels {"address": …}; GET /parcels lists them. A parcel and its event are one transaction."""

import contextlib
import json
import os
import signal
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import psycopg2


@contextlib.contextmanager
def transaction():
    """Commits at its end, rolls back on an error."""
    with contextlib.closing(psycopg2.connect(os.environ["DATABASE_URL"])) as database:
        with database, database.cursor() as cursor:
            yield cursor


class Parcels(BaseHTTPRequestHandler):
    def do_GET(self):
        with transaction() as cursor:
            cursor.execute("select id, address from parcels")
            self.answer(200, [{"id": parcel, "address": address} for parcel, address in cursor])

    def do_POST(self):
        try:
            address = json.loads(self.rfile.read(int(self.headers["content-length"])))["address"]
        except (KeyError, TypeError, ValueError):
            return self.answer(400, {"detail": 'the body is JSON with an address: {"address": "12 Weaver Lane"}'})
        with transaction() as cursor:
            cursor.execute("insert into parcels (address) values (%s) returning id", [address])
            parcel = cursor.fetchone()[0]
            cursor.execute(
                "insert into weft.outbox (aggregate_type, aggregate_id, type, payload) values ('parcel', %s, 'ParcelTaken', %s)",
                [parcel, json.dumps({"address": address})],
            )
        self.answer(201, {"id": parcel})

    def answer(self, status, body):
        body = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # the first process of a container ends only by its own will
ThreadingHTTPServer(("", 8080), Parcels).serve_forever()
