"""Download the source archive of one package from a package index; a program of its own, which runs nothing of it.

    python fetch_script.py FOLDER NAME VERSION

`pip download` would run code of the archive with the network, to learn its dependencies. The index is that of pip's
variables: PIP_INDEX_URL, or a folder of files in PIP_FIND_LINKS. Whoever called compares the archive's digest.
"""

import html.parser
import netrc
import os
import re
import shutil
import ssl
import sys
import urllib.parse
import urllib.request
from pathlib import Path

TIMEOUT_S = 60
MAX_PAGE_BYTES = 64 * 10**6
MAX_ARCHIVE_BYTES = 500 * 10**6
ENDINGS = (".tar.gz", ".zip")


class Links(html.parser.HTMLParser):
    """The addresses of the links of a page (PEP 503)."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Keep the address of a link."""
        self.found += [value for name, value in attrs if tag == "a" and name == "href" and value]


def is_archive(file: str, name: str, version: str) -> bool:
    """Return whether a file name is that of the source archive of a package."""
    for ending in ENDINGS:
        if file.endswith(ending):
            stem, _, found = file.removesuffix(ending).rpartition("-")
            return re.sub(r"[-_.]+", "-", stem).lower() == name and found == version
    return False


def opener(index: str) -> tuple[urllib.request.OpenerDirector, str]:
    """Return what opens addresses, and the index's address without a password; that goes to the index's host only."""
    context = ssl.create_default_context(
        cafile=next(filter(None, map(os.environ.get, ("PIP_CERT", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"))), None)
    )
    if client := os.environ.get("PIP_CLIENT_CERT"):
        context.load_cert_chain(client)
    handlers: list[urllib.request.BaseHandler] = [urllib.request.HTTPSHandler(context=context)]
    if proxy := os.environ.get("PIP_PROXY"):
        handlers.append(urllib.request.ProxyHandler({"http": proxy, "https": proxy}))
    parts = urllib.parse.urlsplit(index)
    user, password = urllib.parse.unquote(parts.username or ""), urllib.parse.unquote(parts.password or "")
    if not user and (settings := os.environ.get("NETRC")):
        user, _, password = netrc.netrc(settings).authenticators(parts.hostname or "") or ("", "", "")
    plain = parts._replace(netloc=parts.netloc.rpartition("@")[2])
    if user:
        known = urllib.request.HTTPPasswordMgrWithPriorAuth()
        known.add_password(None, f"{plain.scheme}://{plain.netloc}/", user, password or "", is_authenticated=True)
        handlers.append(urllib.request.HTTPBasicAuthHandler(known))
    return urllib.request.build_opener(*handlers), plain.geturl()


def find_archive(client: urllib.request.OpenerDirector, index: str, name: str, version: str) -> str:
    """Return the address of the archive on an index.

    Raises:
        LookupError: the index has no such file.
        ValueError: it names one in a place that is refused.
    """
    page = f"{index.rstrip('/')}/{name}/"
    with client.open(page, timeout=TIMEOUT_S) as answer:
        text: bytes = answer.read(MAX_PAGE_BYTES)
        page = str(answer.url)
    links = Links()
    links.feed(text.decode("utf-8", "replace"))
    for link in links.found:
        address = urllib.parse.urljoin(page, link)
        if is_archive(urllib.parse.unquote(urllib.parse.urlsplit(address).path).rpartition("/")[2], name, version):
            if urllib.parse.urlsplit(address).scheme not in ("https", urllib.parse.urlsplit(index).scheme):
                raise ValueError(
                    f"the index names a file that is neither at https nor where it is itself: {address[:200]}"
                )
            return urllib.parse.urldefrag(address).url
    raise LookupError(f"the index has no source archive of {name} {version}")


def download_archive(client: urllib.request.OpenerDirector, address: str, folder: Path) -> None:
    """Write a file of an index into a folder.

    Raises:
        ValueError: it is larger than any source archive of a lock.
    """
    file = urllib.parse.unquote(urllib.parse.urlsplit(address).path).rpartition("/")[2]
    with client.open(address, timeout=TIMEOUT_S) as answer, (folder / file).open("xb") as out:
        left = MAX_ARCHIVE_BYTES
        while block := answer.read(2**20):
            left -= len(block)
            if left < 0:
                raise ValueError(f"{file} has over {MAX_ARCHIVE_BYTES} bytes")
            out.write(block)


def fetch(folder: Path, name: str, version: str) -> None:
    """Write the source archive of a package into a folder."""
    if os.environ.get("PIP_NO_INDEX"):
        files = [file for file in Path(os.environ["PIP_FIND_LINKS"]).iterdir() if is_archive(file.name, name, version)]
        if not files:
            raise LookupError(f"the folder has no source archive of {name} {version}")
        shutil.copyfile(files[0], folder / files[0].name)
        return
    client, index = opener(os.environ["PIP_INDEX_URL"])
    download_archive(client, find_archive(client, index, name, version), folder)


if __name__ == "__main__":
    try:
        fetch(Path(sys.argv[1]), *sys.argv[2:])
    except (OSError, LookupError, ValueError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
