"""What the browser tests share: a real Chromium, and a web server for a folder."""
import contextlib
import functools
import http.server
import tempfile
import threading
from pathlib import Path

FLAGS = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
         '--disable-component-update', '--disable-sync']


@contextlib.contextmanager
def browser(chromium: str):
    "A headless Chromium with an empty profile; gives a playwright context"
    from playwright.sync_api import sync_playwright
    with sync_playwright() as play, tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        context = play.chromium.launch_persistent_context(profile, executable_path=chromium, headless=True, args=FLAGS,
                                                          viewport={'width': 1360, 'height': 1000})
        context.set_default_timeout(30_000)
        try: yield context
        finally: context.close()


class Quiet(http.server.SimpleHTTPRequestHandler):
    "A file server that does not print every request"
    def log_message(self, *args): pass


@contextlib.contextmanager
def serve(folder: Path):
    "Serve `folder` on a free port of the loopback interface; gives the address"
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try: yield f'http://127.0.0.1:{server.server_port}'
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)
