"""Downloads: a local server plays every fault of a source, archives play every trick."""
import contextlib
import errno
import gzip
import hashlib
import io
import json
import os
import signal
import stat
import struct
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from caption_nb import cli
from caption_nb import download as module
from caption_nb.download import (SOURCES, DownloadError, Limits, Remote, Source, archive_kind, catalogue, download, fetch, find_source,
                                 safe_name, unpack, url_lines, verify)


def zipped(files: dict[str, bytes], method=zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, 'w', method) as z:
        for name, content in files.items(): z.writestr(name, content)
    return out.getvalue()


PHOTOS = {f'photos/{i}.jpg': os.urandom(150_000) for i in range(10)} | {'captions.txt': b'image,caption\n0.jpg,noise\n'}
GOOD = zipped(PHOTOS)
PAGE = b'<!DOCTYPE html><html><head><title>Sign in &amp; pay</title></head><body>' + b'x'*3000 + b'</body></html>'


def sha(content: bytes) -> str: return f'sha256:{hashlib.sha256(content).hexdigest()}'


class Web:
    "A server whose answers a test scripts: path -> function of the request handler, or bytes"
    def __init__(self):
        web = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                web.asked.append((self.path.strip('/'), self.headers.get('Range'), self.headers.get('If-Range')))
                answer = web.pages.get(self.path.strip('/'))
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    if answer is None: self.send_error(404)
                    elif callable(answer): answer(self)
                    else: serve(self, answer)

            def log_message(self, *args): pass
        self.pages, self.asked = {}, []
        self.server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, kwargs=dict(poll_interval=0.02), daemon=True).start()

    def url(self, name: str) -> str: return f'http://127.0.0.1:{self.server.server_port}/{name}'

    def ranges(self) -> list: return [r for _, r, _ in self.asked]


def serve(handler, content: bytes, cut: float = 1., tag: str = '"1"', ranges=True, kind='application/zip', announce=True, pace: float = 0.):
    "Answer with `content`, only a share `cut` of what was asked for"
    wanted = handler.headers.get('Range') if ranges else None
    if wanted and handler.headers.get('If-Range') not in (None, tag): wanted = None
    start = int(wanted[6:-1]) if wanted else 0
    if wanted and start >= len(content):
        handler.send_response(416)
        handler.send_header('Content-Range', f'bytes */{len(content)}')
        handler.send_header('Content-Length', '0')
        return handler.end_headers()
    rest = content[start:]
    handler.send_response(206 if wanted else 200)
    handler.send_header('Content-Type', kind)
    if tag: handler.send_header('ETag', tag)
    if announce: handler.send_header('Content-Length', str(len(rest)))
    if wanted: handler.send_header('Content-Range', f'bytes {start}-{len(content) - 1}/{len(content)}')
    handler.end_headers()
    rest = rest[:round(cut*len(content)) if cut < 1 else None]
    step = 1 if pace else len(rest) or 1
    for i in range(0, len(rest), step):
        handler.wfile.write(rest[i:i + step])
        handler.wfile.flush()
        time.sleep(pace)


def once(first, then):
    "The first question gets `first`, all others `then`"
    left = [first]
    return lambda handler: (left.pop() if left else then)(handler)


@pytest.fixture
def web():
    web = Web()
    yield web
    web.server.shutdown()
    web.server.server_close()


def remote(web, *paths, content=GOOD, size=None, checksum=None, **more) -> Remote:
    return Remote('good.zip', tuple(map(web.url, paths or ('good.zip',))), len(content) if size is None else size,
                  sha(content) if checksum is None else checksum, **more)


def get(remote, folder, **more) -> Path: return fetch(remote, folder, **dict(pause=0.001, quiet=True) | more)


def names(folder) -> list[str]: return sorted(p.name for p in Path(folder).iterdir())


def toy(*files, **more) -> dict: return dict(toy=Source('toy', 'A toy', more.pop('licence', 'Yours.'), files, **more))


def bring(folder, sources, **more) -> Path:
    return download('toy', folder, sources=sources, **dict(accept_licence=True, quiet=True, pause=0.001) | more)


# ---- the connection ---------------------------------------------------------------------------------------------

def test_broken_at_30_percent_goes_on_from_there(web, tmp_path):
    web.pages['good.zip'] = once(lambda h: serve(h, GOOD, cut=0.3), lambda h: serve(h, GOOD))
    assert get(remote(web), tmp_path).read_bytes() == GOOD
    assert web.ranges() == [None, f'bytes={round(0.3*len(GOOD))}-'] and web.asked[1][2] == '"1"'
    assert names(tmp_path) == ['good.zip']


def test_breaks_many_times(web, tmp_path):
    web.pages['good.zip'] = lambda h: serve(h, GOOD, cut=0.1)
    assert get(remote(web), tmp_path).read_bytes() == GOOD
    assert len(web.asked) >= 10


def test_goes_on_after_being_killed(web, tmp_path):
    "Not one byte twice, even in another process"
    web.pages['good.zip'] = lambda h: serve(h, GOOD, cut=0.6) if not h.headers.get('Range') else h.send_error(503)
    with pytest.raises(DownloadError, match='503'): get(remote(web), tmp_path)
    assert names(tmp_path) == ['good.zip.part', 'good.zip.part.json']
    web.pages['good.zip'] = GOOD
    assert get(remote(web), tmp_path).read_bytes() == GOOD
    assert web.ranges()[-1] == f'bytes={round(0.6*len(GOOD))}-'


def test_server_without_ranges_starts_again(web, tmp_path):
    web.pages['good.zip'] = once(lambda h: serve(h, GOOD, 0.3, ranges=False), lambda h: serve(h, GOOD, ranges=False))
    assert get(remote(web), tmp_path).read_bytes() == GOOD


def test_a_new_version_is_not_glued_to_the_old(web, tmp_path):
    new = zipped({'a.txt': b'new'*100_000})
    web.pages['good.zip'] = once(lambda h: serve(h, GOOD, 0.3, tag='"old"'), lambda h: serve(h, new, tag='"new"'))
    assert get(remote(web, size=0, checksum=''), tmp_path).read_bytes() == new
    assert web.asked[1][1:] == (f'bytes={round(0.3*len(GOOD))}-', '"old"')


@pytest.mark.parametrize('tag', ['', 'W/"weak"'])
def test_without_a_version_or_a_checksum_it_starts_again(web, tmp_path, tag):
    web.pages['good.zip'] = once(lambda h: serve(h, GOOD, 0.3, tag=tag), lambda h: serve(h, GOOD, tag=tag))
    assert get(remote(web, size=0, checksum=''), tmp_path).read_bytes() == GOOD
    assert web.ranges() == [None, None]


def test_the_next_mirror_goes_on_if_a_checksum_guards_it(web, tmp_path):
    web.pages |= {'a.zip': once(lambda h: serve(h, GOOD, 0.5, tag='"a"'), lambda h: h.send_error(503)), 'b.zip': lambda h: serve(h, GOOD, tag='"b"')}
    assert get(remote(web, 'a.zip', 'b.zip'), tmp_path).read_bytes() == GOOD
    assert web.asked[-1] == ('b.zip', f'bytes={round(0.5*len(GOOD))}-', None)


def test_pieces_that_do_not_fit_are_fetched_once_more(web, tmp_path):
    (tmp_path/'good.zip.part').write_bytes(b'PK\3\4' + bytes(1000))
    web.pages['good.zip'] = GOOD
    assert get(remote(web), tmp_path).read_bytes() == GOOD
    assert web.ranges() == ['bytes=1004-', None]


def test_all_was_here_already(web, tmp_path):
    (tmp_path/'good.zip.part').write_bytes(GOOD)
    assert get(remote(web), tmp_path).read_bytes() == GOOD and not web.asked
    (tmp_path/'good.zip').rename(tmp_path/'good.zip.part')
    web.pages['good.zip'] = GOOD
    assert get(remote(web, size=0), tmp_path).read_bytes() == GOOD and len(web.asked) == 1   # 416: nothing more to come


def test_a_part_that_is_too_long(web, tmp_path):
    (tmp_path/'good.zip.part').write_bytes(GOOD + b'more')
    web.pages['good.zip'] = GOOD
    assert get(remote(web, size=0), tmp_path).read_bytes() == GOOD
    (tmp_path/'good.zip').rename(tmp_path/'good.zip.part')
    with open(tmp_path/'good.zip.part', 'ab') as f: f.write(b'more')
    assert get(remote(web), tmp_path).read_bytes() == GOOD


def test_missing_mirror(web, tmp_path):
    web.pages['b.zip'] = GOOD
    assert get(remote(web, 'a.zip', 'b.zip'), tmp_path).read_bytes() == GOOD
    assert [name for name, *_ in web.asked] == ['a.zip', 'b.zip']   # a 404 is asked once


def test_no_mirror_has_it(web, tmp_path):
    with pytest.raises(DownloadError, match=r'good.zip: no mirror gave it:\n.*a.zip: 404 Not Found\n.*b.zip: 404.*\n.*--from-folder'):
        get(remote(web, 'a.zip', 'b.zip'), tmp_path)
    assert not names(tmp_path)


def test_nobody_listens(tmp_path):
    dead = Remote('good.zip', ('http://127.0.0.1:9/good.zip', 'http://no-such-host.invalid/good.zip'), 10, 'sha256:00')
    with pytest.raises(DownloadError, match='Connection refused'): get(dead, tmp_path)
    assert not names(tmp_path)


def moved_to(url: str):
    def answer(handler):
        handler.send_response(302)
        handler.send_header('Location', url)
        handler.send_header('Content-Length', '0')
        handler.end_headers()
    return answer


def test_redirect(web, tmp_path):
    web.pages |= {'good.zip': moved_to(web.url('elsewhere/good.zip')), 'elsewhere/good.zip': once(lambda h: serve(h, GOOD, 0.3), lambda h: serve(h, GOOD))}
    assert get(remote(web), tmp_path).read_bytes() == GOOD
    assert web.ranges()[-1] == f'bytes={round(0.3*len(GOOD))}-'   # the range goes along


def test_redirect_in_circles(web, tmp_path):
    web.pages['good.zip'] = moved_to(web.url('good.zip'))
    with pytest.raises(DownloadError, match='302'): get(remote(web), tmp_path)


@pytest.mark.parametrize('code', [429, 500, 503])
def test_a_busy_server_is_asked_again(web, tmp_path, code):
    web.pages['good.zip'] = once(lambda h: h.send_error(code), lambda h: serve(h, GOOD))
    assert get(remote(web), tmp_path).read_bytes() == GOOD


def test_silence_goes_to_the_next_mirror(web, tmp_path):
    silent = threading.Event()
    web.pages |= {'a.zip': lambda h: silent.wait(20), 'b.zip': GOOD}
    try: assert get(remote(web, 'a.zip', 'b.zip'), tmp_path, stall=0.1).read_bytes() == GOOD
    finally: silent.set()


def test_drips_are_no_progress(web, tmp_path):
    "A byte now and then never lets a socket time out"
    web.pages |= {'a.zip': lambda h: serve(h, GOOD[:40], pace=0.02), 'b.zip': GOOD}
    assert get(remote(web, 'a.zip', 'b.zip', size=0), tmp_path, stall=0.15).read_bytes() == GOOD


def test_slow_but_steady_arrives(web, tmp_path):
    def slow(handler):
        handler.send_response(200)
        handler.send_header('Content-Length', str(len(GOOD)))
        handler.end_headers()
        for i in range(0, len(GOOD), 50_000): handler.wfile.write(GOOD[i:i + 50_000]); time.sleep(0.02)
    web.pages['good.zip'] = slow
    assert get(remote(web), tmp_path, stall=0.3).read_bytes() == GOOD and len(web.asked) == 1


def test_size_not_announced(web, tmp_path):
    web.pages['good.zip'] = lambda h: serve(h, GOOD, announce=False)
    assert get(remote(web), tmp_path).read_bytes() == GOOD
    web.pages['good.zip'] = lambda h: serve(h, GOOD + b'more', announce=False)
    with pytest.raises(DownloadError, match='sends more than'): get(remote(web), tmp_path)
    assert names(tmp_path)[0] == 'good.zip'


def test_chunked(web, tmp_path):
    def chunked(handler, cut=False):
        handler.protocol_version = 'HTTP/1.1'
        handler.send_response(200)
        handler.send_header('Transfer-Encoding', 'chunked')
        handler.end_headers()
        for i in range(0, len(GOOD), 400_000):
            block = GOOD[i:i + 400_000]
            handler.wfile.write(b'%x\r\n%s\r\n' % (len(block), block))
            if cut: handler.close_connection = True; return
        handler.wfile.write(b'0\r\n\r\n')
        handler.close_connection = True
    web.pages['good.zip'] = once(lambda h: chunked(h, cut=True), chunked)
    assert get(remote(web), tmp_path).read_bytes() == GOOD


# ---- not the file -----------------------------------------------------------------------------------------------

def test_wrong_checksum(web, tmp_path):
    web.pages['good.zip'] = GOOD[:-30] + bytes([GOOD[-30] ^ 1]) + GOOD[-29:]
    with pytest.raises(DownloadError, match='wrong checksum: sha256 .* in place of'): get(remote(web), tmp_path)
    assert not names(tmp_path)


def test_wrong_checksum_at_the_first_mirror(web, tmp_path):
    web.pages |= {'a.zip': bytes(reversed(GOOD)), 'b.zip': GOOD}
    assert get(remote(web, 'a.zip', 'b.zip'), tmp_path).read_bytes() == GOOD


def test_md5(web, tmp_path):
    web.pages['good.zip'] = GOOD
    assert get(remote(web, checksum=f'md5:{hashlib.md5(GOOD).hexdigest()}'), tmp_path).read_bytes() == GOOD
    with pytest.raises(DownloadError, match='md5 .* in place of 00'): get(remote(web, checksum='md5:00'), tmp_path)


@pytest.mark.parametrize('kind', ['text/html; charset=utf-8', 'application/zip'])
def test_a_page_in_place_of_a_zip(web, tmp_path, kind):
    web.pages['good.zip'] = lambda h: serve(h, PAGE, kind=kind)
    with pytest.raises(DownloadError, match="a web page titled 'Sign in & pay' in place of good.zip"):
        get(remote(web, size=0, checksum=''), tmp_path)
    assert not names(tmp_path)


def test_a_page_does_not_cost_what_was_here(web, tmp_path):
    "A quota notice at half of the way: the half stays"
    web.pages['good.zip'] = once(lambda h: serve(h, GOOD, 0.5), lambda h: serve(h, PAGE, ranges=False, kind='text/html'))
    with pytest.raises(DownloadError, match=r'web page|bytes under this name'): get(remote(web), tmp_path)
    assert (tmp_path/'good.zip.part').stat().st_size == round(0.5*len(GOOD))


def test_no_archive_at_all(web, tmp_path):
    for content in (bytes(5000), b'short'):
        web.pages['good.zip'] = content
        with pytest.raises(DownloadError, match='no archive: it begins with'): get(remote(web, size=0, checksum=''), tmp_path)
        assert not names(tmp_path)


def test_wrong_size_is_seen_before_it_comes(web, tmp_path):
    web.pages['good.zip'] = GOOD
    with pytest.raises(DownloadError, match='bytes under this name, and good.zip has'): get(remote(web, size=len(GOOD) + 5), tmp_path)
    assert not names(tmp_path)


def test_disk_full(web, tmp_path, monkeypatch):
    web.pages['good.zip'] = GOOD
    monkeypatch.setattr(module.shutil, 'disk_usage', lambda p: os.terminal_size((0, 0)) and type('U', (), {'free': 1000}))
    with pytest.raises(DownloadError, match='needs 1.5 MB and its disk has 1 kB: make room'): get(remote(web), tmp_path)
    monkeypatch.undo()

    def full(out, pieces, most):
        out.write(next(pieces)[:100])
        raise OSError(errno.ENOSPC, 'No space left on device')
        yield
    monkeypatch.setattr(module, '_written', full)
    with pytest.raises(DownloadError, match='the disk is full: make room and run again'): get(remote(web), tmp_path)
    assert 'good.zip' not in names(tmp_path)
    monkeypatch.undo()
    assert get(remote(web), tmp_path).read_bytes() == GOOD


# ---- archives ---------------------------------------------------------------------------------------------------

def tarred(*members, mode='w:gz') -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as t:
        for m in members:
            name, content, kind, link = (*m, None, None)[:4] if len(m) < 4 else m
            info = tarfile.TarInfo(name)
            info.size = len(content or b'')
            if kind: info.type, info.linkname = kind, link or ''
            t.addfile(info, io.BytesIO(content or b''))
    return out.getvalue()


def mode_zip(name: str, mode: int, content=b'target') -> bytes:
    info = zipfile.ZipInfo(name)
    info.external_attr, info.create_system = mode << 16, 3
    out = io.BytesIO()
    with zipfile.ZipFile(out, 'w') as z: z.writestr(info, content)
    return out.getvalue()


BAD = {
    'zip up': (zipped({'../x': b'1'}), 'leaves the folder'),
    'zip deep up': (zipped({'a/b/../../../x': b'1'}), 'leaves the folder'),
    'zip backslash up': (zipped({'a\\..\\..\\x': b'1'}), 'leaves the folder'),
    'zip absolute': (zipped({'/tmp/caption_nb_evil': b'1'}), 'an absolute path'),
    'zip drive': (zipped({'C:/x': b'1'}), 'drive letter'),
    'zip share': (zipped({'\\\\server\\x': b'1'}), 'an absolute path'),
    'zip link': (mode_zip('a', stat.S_IFLNK | 0o777, b'/etc/passwd'), 'holds a link'),
    'zip device': (mode_zip('a', stat.S_IFCHR | 0o666), 'holds a device'),
    'zip control': (zipped({'a\nb': b'1'}), 'control characters'),
    'zip mac up': (zipped({'__MACOSX/../../x': b'1'}), 'leaves the folder'),
    'tar up': (tarred(('../x', b'1')), 'leaves the folder'),
    'tar absolute': (tarred(('/tmp/caption_nb_evil', b'1'), mode='w'), 'an absolute path'),
    'tar symlink': (tarred(('a', b'', tarfile.SYMTYPE, '/'), ('a/x', b'1')), 'holds a link'),
    'tar hardlink': (tarred(('a', b'', tarfile.LNKTYPE, '../../x')), 'holds a link'),
    'tar fifo': (tarred(('a', b'', tarfile.FIFOTYPE)), 'holds a device'),
    'tar block device': (tarred(('a', b'', tarfile.BLKTYPE)), 'holds a device'),
    'tar twice': (tarred(('a', b'1'), ('a', b'2')), 'twice'),
    'file and folder': (tarred(('a', b'1'), ('a/b', b'2')), 'as a file and as a folder'),
    'zip bomb': (zipped({'zeros': bytes(3*10**6)}, zipfile.ZIP_DEFLATED), 'the most that its size allows'),
    'tar bomb': (tarred(('zeros', bytes(3*10**6))), 'unpacks to more than'),
    'many': (zipped({str(i): b'' for i in range(60)}), 'more than 50 files'),
}


@pytest.mark.parametrize('case', BAD)
def test_malicious_archives_are_refused(tmp_path, case):
    content, why = BAD[case]
    (tmp_path/'bad').write_bytes(content)
    with pytest.raises(DownloadError, match=f'refused, for it .*{why}'):
        unpack(tmp_path/'bad', tmp_path/'in'/'side', Limits(files=50, small=10**6), quiet=True)
    assert names(tmp_path) == ['bad', 'in'] and names(tmp_path/'in') == ['side'] and not os.path.exists('/tmp/caption_nb_evil')


@pytest.mark.parametrize('case', BAD)
def test_nothing_of_a_malicious_archive_is_in_place(web, tmp_path, case, monkeypatch):
    content, _ = BAD[case]
    monkeypatch.setattr(module, 'unpack', lambda a, f, quiet: unpack(a, f, Limits(files=50, small=10**6), quiet))
    web.pages['good.zip'] = content
    with pytest.raises(DownloadError, match='refused'): bring(tmp_path/'data', toy(remote(web, content=content)))
    assert names(tmp_path/'data') == ['.downloads'] and names(tmp_path) == ['data']
    assert not [p for p in names(tmp_path/'data'/'.downloads') if p.startswith('unpacking')]


def test_a_zip_that_lies_about_its_size(tmp_path):
    "The header says 10 bytes, and a megabyte of zeros is packed"
    content = bytearray(zipped({'zeros': bytes(10**6)}, zipfile.ZIP_DEFLATED))
    for signature, at in ((b'PK\3\4', 22), (b'PK\1\2', 24)): struct.pack_into('<I', content, content.index(signature) + at, 10)
    (tmp_path/'bad.zip').write_bytes(content)
    with pytest.raises(DownloadError, match='damaged|refused'): unpack(tmp_path/'bad.zip', tmp_path/'in', quiet=True)
    assert sum(p.stat().st_size for p in (tmp_path/'in').rglob('*')) <= 10


def test_a_tar_whose_long_name_is_a_bomb(tmp_path):
    "GNU tar keeps long names in a block of their own; this one claims 2 GB, and its zeros pack well"
    info = tarfile.TarInfo('././@LongLink')
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 1 << 31
    (tmp_path/'bad.tar.gz').write_bytes(gzip.compress(info.tobuf(tarfile.GNU_FORMAT) + bytes(10**6)))
    with pytest.raises(DownloadError, match='claims a header'): unpack(tmp_path/'bad.tar.gz', tmp_path/'in', quiet=True)


@pytest.mark.parametrize('content', [GOOD[:len(GOOD)//2], GOOD[:-4000] + bytes(4000), b'PK\3\4' + bytes(1000),
                                     tarred(*PHOTOS.items())[:400_000], gzip.compress(b'no tar'), b'plain text', b''],
                         ids=['half a zip', 'zip without its end', 'zip in name', 'half a tar', 'gzip of no tar', 'text', 'empty'])
def test_damaged_archives_are_named(tmp_path, content):
    (tmp_path/'bad.zip').write_bytes(content)
    with pytest.raises(DownloadError, match=r'bad.zip .*(--force|own source)'): unpack(tmp_path/'bad.zip', tmp_path/'in', quiet=True)


def test_a_zip_with_a_password(tmp_path):
    content = bytearray(GOOD)
    for signature, at in ((b'PK\3\4', 6), (b'PK\1\2', 8)): content[content.index(signature) + at] |= 1
    (tmp_path/'bad.zip').write_bytes(content)
    with pytest.raises(DownloadError, match='password'): unpack(tmp_path/'bad.zip', tmp_path/'in', quiet=True)


@pytest.mark.parametrize('make', [zipped, lambda f: zipped(f, zipfile.ZIP_DEFLATED), lambda f: tarred(*f.items()),
                                  lambda f: tarred(*f.items(), mode='w')])
def test_good_archives_come_out(tmp_path, make):
    (tmp_path/'a').write_bytes(make(PHOTOS | {'__MACOSX/._x': b'', 'deep/er/é.txt': b'', 'photos/.DS_Store': b'1'}))
    made = unpack(tmp_path/'a', tmp_path/'out', quiet=True)
    assert {n: (tmp_path/'out'/n).read_bytes() for n, *_ in made} == PHOTOS | {'deep/er/é.txt': b''}
    assert sorted(p.relative_to(tmp_path/'out').as_posix() for p in (tmp_path/'out').rglob('*') if p.is_file()) == sorted(n for n, *_ in made)


def test_kinds_and_names():
    assert [archive_kind(c[:262]) for c in (GOOD, tarred(('a', b'1')), tarred(('a', b'1'), mode='w'), PAGE, b'')] == ['zip', 'gzip', 'tar', '', '']
    assert safe_name('a/./b//c.jpg') == 'a/b/c.jpg'


# ---- all of it --------------------------------------------------------------------------------------------------

def test_arrives_checked_and_unpacked(web, tmp_path):
    web.pages['good.zip'] = GOOD
    sources = toy(remote(web))
    out = bring(tmp_path/'data', sources)
    assert names(out) == ['.downloads', 'captions.txt', 'photos'] and names(out/'.downloads') == ['downloads.json', 'good.zip.files']
    assert all((out/n).read_bytes() == c for n, c in PHOTOS.items())
    bring(out, sources)
    assert len(web.asked) == 1 and verify('toy', out, sources=sources, quiet=True) == []
    (out/'photos'/'3.jpg').unlink()
    bring(out, sources)          # what is missing comes again
    assert len(web.asked) == 2 and (out/'photos'/'3.jpg').is_file()
    bring(out, sources, force=True)
    assert len(web.asked) == 3


def test_verify_finds_one_bit(web, tmp_path):
    web.pages['good.zip'] = GOOD
    sources = toy(remote(web))
    assert verify('toy', tmp_path/'data', sources=sources, quiet=True) == [f'good.zip: has not arrived in {tmp_path/"data"}']
    out = bring(tmp_path/'data', sources)
    photo = out/'photos'/'2.jpg'
    photo.write_bytes(bytes([photo.read_bytes()[0] ^ 1]) + photo.read_bytes()[1:])
    (out/'captions.txt').unlink()
    assert verify('toy', out, sources=sources, quiet=True) == ['photos/2.jpg: changed', 'captions.txt: missing']
    assert len(web.asked) == 1


def test_keep_and_start_from_what_was_kept(web, tmp_path):
    web.pages['good.zip'] = GOOD
    sources = toy(remote(web))
    out = bring(tmp_path/'data', sources, keep=True)
    assert (out/'.downloads'/'good.zip').read_bytes() == GOOD
    (out/'captions.txt').unlink()
    bring(out, sources, keep=True)
    assert len(web.asked) == 1 and (out/'captions.txt').is_file()


def test_first_download_is_recorded_and_later_ones_must_equal_it(web, tmp_path, capsys):
    web.pages['good.zip'] = GOOD
    sources = toy(remote(web, size=0, checksum=''))
    out = bring(tmp_path/'data', sources, quiet=False)
    assert 'no checksum is published' in capsys.readouterr().out
    assert json.loads((out/'.downloads'/'downloads.json').read_text())['files']['good.zip']['sha256'] == sha(GOOD)[7:]
    web.pages['good.zip'] = zipped({'captions.txt': b'other'})
    with pytest.raises(DownloadError, match=r'(?s)wrong checksum.*recorded at the first download.*remove good.zip from'):
        bring(out, sources, force=True)
    assert (out/'captions.txt').read_bytes() == PHOTOS['captions.txt']


def test_licence_is_asked_for_once(web, tmp_path, capsys):
    web.pages['good.zip'] = GOOD
    sources, questions = toy(remote(web), licence='Be nice.'), []
    def answer(text): return lambda question: questions.append(question) or text
    with pytest.raises(DownloadError, match='not accepted, nothing done'):
        bring(tmp_path/'data', sources, accept_licence=False, ask=answer(''))
    assert not (tmp_path/'data').exists() and 'Be nice.' in capsys.readouterr().out and not web.asked
    out = bring(tmp_path/'data', sources, accept_licence=False, ask=answer('Y'))
    bring(out, sources, accept_licence=False, force=True, ask=answer('n'))
    assert len(questions) == 2 and len(web.asked) == 2
    changed = toy(remote(web), licence='Be nicer.')
    with pytest.raises(DownloadError, match='not accepted'): bring(out, changed, accept_licence=False, force=True, ask=answer('n'))


def test_nobody_is_there_to_accept(web, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, 'stdin', io.StringIO())
    with pytest.raises(DownloadError, match='--accept-licence'): bring(tmp_path/'data', toy(remote(web)), accept_licence=False)
    assert not (tmp_path/'data').exists()


def test_a_plain_file_needs_no_unpacking(web, tmp_path):
    web.pages['coco.pt'] = b'PK\3\4' + bytes(5000)
    sources = toy(Remote('coco.pt', (web.url('coco.pt'),), archive=False))
    out = bring(tmp_path/'data', sources)
    assert names(out) == ['.downloads', 'coco.pt'] and verify('toy', out, sources=sources, quiet=True) == []


def test_a_source_that_asks_for_a_form(web, tmp_path):
    with pytest.raises(DownloadError, match=r'(?s)fill in https://forms.*--from-folder'): download('flickr30k', tmp_path/'f30k')
    assert not (tmp_path/'f30k').exists()
    mail = tmp_path/'mail'
    mail.mkdir()
    with pytest.raises(DownloadError, match='mail lacks flickr30k-images.tar.gz'):
        download('flickr30k', tmp_path/'f30k', from_folder=mail, accept_licence=True)
    (mail/'flickr30k-images.tar').write_bytes(tarred(('flickr30k-images/1.jpg', b'1'), mode='w'))
    out = download('flickr30k', tmp_path/'f30k', from_folder=mail, accept_licence=True, quiet=True)
    assert (out/'flickr30k-images'/'1.jpg').read_bytes() == b'1' and names(mail) == ['flickr30k-images.tar']
    (mail/'flickr30k.tar.gz').write_bytes(tarred(('results_20130124.token', b'1.jpg#0\ta')))
    download('flickr30k', out, from_folder=mail, quiet=True)   # the captions come later
    assert (out/'results_20130124.token').is_file()
    download('flickr30k', out, quiet=True)                     # and now it is there


def test_from_folder(web, tmp_path):
    sources, hand = toy(remote(web), Remote('coco.pt', (web.url('coco.pt'),), archive=False)), tmp_path/'hand'
    with pytest.raises(DownloadError, match='no such folder'): bring(tmp_path/'data', sources, from_folder=hand)
    hand.mkdir()
    with pytest.raises(DownloadError, match=r"(?s)lacks good.zip, coco.pt of toy.*http://127"): bring(tmp_path/'data', sources, from_folder=hand)
    (hand/'coco.pt').write_bytes(b'PK\3\4x')
    for content, why in ((GOOD[:-1], 'it is cut off'), (GOOD[:-1] + bytes([GOOD[-1] ^ 1]), 'wrong checksum')):
        (hand/'good.zip').write_bytes(content)
        with pytest.raises(DownloadError, match=why): bring(tmp_path/'data', sources, from_folder=hand)
        assert names(tmp_path/'data') == ['.downloads']
        assert [why in text for text in verify('toy', tmp_path/'data', hand, quiet=True, sources=sources)] == [True]
    (hand/'good.zip').write_bytes(GOOD)
    assert verify('toy', tmp_path/'data', hand, quiet=True, sources=sources) == []
    out = bring(tmp_path/'data', sources, from_folder=hand)
    assert names(hand) == ['coco.pt', 'good.zip'] and names(out) == ['.downloads', 'captions.txt', 'coco.pt', 'photos'] and not web.asked


def test_a_page_saved_by_hand(web, tmp_path):
    (tmp_path/'good.zip').write_bytes(PAGE)
    with pytest.raises(DownloadError, match="web page titled 'Sign in & pay'"):
        bring(tmp_path/'data', toy(remote(web, size=0, checksum='')), from_folder=tmp_path)


def test_two_sources_share_a_folder_and_yours_stays(web, tmp_path):
    one, two = zipped({'annotations/a.json': b'1', 'same.txt': b's'}), zipped({'annotations/b.json': b'2', 'same.txt': b's'})
    web.pages |= {'one.zip': one, 'two.zip': two}
    files = [Remote(f'{n}.zip', (web.url(f'{n}.zip'),)) for n in ('one', 'two')]
    out = tmp_path/'data'
    (out/'annotations').mkdir(parents=True)
    (out/'annotations'/'b.json').write_bytes(b'mine')
    with pytest.raises(DownloadError, match="other files than two.zip under the same names: 'annotations/b.json'"): bring(out, toy(*files))
    assert (out/'annotations'/'b.json').read_bytes() == b'mine' and (out/'annotations'/'a.json').read_bytes() == b'1'
    bring(out, toy(*files), force=True)
    assert (out/'annotations'/'b.json').read_bytes() == b'2'


def test_a_file_where_a_folder_should_be(web, tmp_path):
    web.pages['good.zip'] = GOOD
    (tmp_path/'data').mkdir()
    (tmp_path/'data'/'photos').write_text('in the way')
    with pytest.raises(DownloadError, match='in the way'): bring(tmp_path/'data', toy(remote(web)))
    assert (tmp_path/'data'/'photos').read_text() == 'in the way'


def test_two_at_once(web, tmp_path):
    going, go = threading.Event(), threading.Event()
    def wait(handler): going.set(); go.wait(20); serve(handler, GOOD)
    web.pages['good.zip'] = wait
    sources, failed = toy(remote(web)), []
    def run():
        try: bring(tmp_path/'data', sources)
        except BaseException as e: failed.append(e)
    first = threading.Thread(target=run)
    first.start()
    assert going.wait(20)
    with pytest.raises(DownloadError, match=f'is being filled by process {os.getpid()} on .*wait for it'): bring(tmp_path/'data', sources)
    go.set()
    first.join()
    assert not failed and len(web.asked) == 1 and verify('toy', tmp_path/'data', sources=sources, quiet=True) == []


@pytest.mark.parametrize('where', ['receiving', 'unpacking'])
def test_kill_at_any_time_leaves_nothing_half(web, tmp_path, where):
    "SIGKILL while it comes, or while it is unpacked; then the same command again"
    going, go = threading.Event(), threading.Event()
    def half(handler):
        handler.send_response(200)
        for header in (('Content-Length', str(len(GOOD))), ('ETag', '"1"')): handler.send_header(*header)
        handler.end_headers()
        handler.wfile.write(GOOD[:800_000])
        handler.wfile.flush()
        going.set()
        go.wait(20)
    if where == 'receiving': web.pages['good.zip'] = half
    else: web.pages['good.zip'] = GOOD
    script = f'''
import sys, time, caption_nb.download as d
copy = d._copy
def slow(*a):
    out = copy(*a); print("unpacked one", flush=True); time.sleep(5); return out
if {where!r} == "unpacking": d._copy = slow
file = d.Remote("good.zip", ({web.url("good.zip")!r},), {len(GOOD)}, {sha(GOOD)!r})
d.download("toy", {str(tmp_path/"data")!r}, accept_licence=True, quiet=True, sources=dict(toy=d.Source("toy", "", "Yours.", (file,))))'''
    child = subprocess.Popen([sys.executable, '-c', script], stdout=subprocess.PIPE, text=True)
    try:
        if where == 'receiving':
            assert going.wait(60)
            part, until = tmp_path/'data'/'.downloads'/'good.zip.part', time.monotonic() + 20
            while time.monotonic() < until and not (part.is_file() and part.stat().st_size): time.sleep(0.02)
        else:
            while 'unpacked one' not in child.stdout.readline(): pass
    finally:
        child.send_signal(signal.SIGKILL)
        child.communicate()
        go.set()
    assert names(tmp_path/'data') == ['.downloads'] and 'good.zip.files' not in names(tmp_path/'data'/'.downloads')
    web.pages['good.zip'] = GOOD
    sources, before = toy(remote(web)), len(web.asked)
    out = bring(tmp_path/'data', sources)
    assert verify('toy', out, sources=sources, quiet=True) == [] and names(out) == ['.downloads', 'captions.txt', 'photos']
    if where == 'receiving': assert web.ranges()[-1].startswith('bytes=')
    else: assert len(web.asked) == before   # the archive was whole already


# ---- the table, the command -------------------------------------------------------------------------------------

def test_table():
    assert {'flickr8k', 'flickr30k', 'coco2014', 'coco2017', 'karpathy-splits', 'glove'} <= set(SOURCES)
    for name, source in SOURCES.items():
        assert source.name == name and source.licence and source.about and name in catalogue()
        assert bool(source.form) != all(f.urls for f in source.files)
        for f in source.files:
            kind, _, digest = f.checksum.partition(':')
            assert not kind or len(digest) == dict(sha256=64, md5=32)[kind] and set(digest) <= set('0123456789abcdef')
            assert all(url.rpartition('/')[2] == f.name and url in url_lines(source) for url in f.urls)
            assert f.checksum or all(url.startswith('https:') for url in f.urls[:1]) or name == 'eecs498-coco'
    with pytest.raises(DownloadError, match='flickr8k'): find_source('flick8k')


def test_command(web, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(['download']) == 0 and 'karpathy-splits' in capsys.readouterr().out
    assert cli.main(['download', 'coco2014', '--print-urls']) == 0
    assert 'images.cocodataset.org/zips/train2014.zip' in capsys.readouterr().out and not names(tmp_path)
    assert cli.main(['download', 'flickr30k']) == 2 and 'forms.illinois.edu' in capsys.readouterr().err
    assert cli.main(['download', 'cocoo']) == 2 and 'did you mean' in capsys.readouterr().err
    assert cli.main(['download', 'glove', '--verify-only']) == 1 and 'has not arrived' in capsys.readouterr().out
    web.pages['good.zip'] = GOOD
    monkeypatch.setitem(SOURCES, 'toy', Source('toy', 'A toy', 'Yours.', (remote(web),)))
    assert cli.main(['download', 'toy', '--accept-licence']) == 0
    out = capsys.readouterr().out
    assert 'Yours.' in out and 'toy is in data/toy: 11 files' in out and verify('toy', quiet=True) == []
    assert cli.main(['download', 'toy', '--verify-only']) == 0 and cli.main(['download', 'toy']) == 0
    assert 'already' in capsys.readouterr().out and len(web.asked) == 1


def test_an_archive_that_does_not_unpack_is_not_what_is_expected_next_time(web, tmp_path):
    "Without a published checksum, half a file brought by hand must not make the whole one wrong"
    sources, hand = toy(remote(web, checksum='', size=0)), tmp_path/'hand'
    hand.mkdir()
    (hand/'good.zip').write_bytes(GOOD[:len(GOOD)//2])
    with pytest.raises(DownloadError, match='is damaged'): bring(tmp_path/'data', sources, from_folder=hand)
    (hand/'good.zip').write_bytes(GOOD)
    assert (bring(tmp_path/'data', sources, from_folder=hand)/'photos').is_dir()
